"""What a run is made of: frozen, strict dataclasses whose defaults are the paper's (Table 1).

A `Config` is data, model and training. `config_values` reads and writes one.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Pixels = Annotated[int, Field(ge=1, le=4096)]
Width = Annotated[int, Field(ge=1, le=4096)]
Steps = Annotated[int, Field(ge=0, le=10**9)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=1e9)]
NonNegative = Annotated[float, Field(ge=0.0, le=1e9)]
Real = Annotated[float, Field(ge=-1e3, le=1e3)]
# 1 / (1 + odds) differs from 0 and 1 in float32
Odds = Annotated[float, Field(ge=1e-6, le=1e9)]
# with a step of 30 bits and a purpose of two, no more than 64 bits
Seed = Annotated[int, Field(ge=0, lt=2**30)]


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how scenes are scattered where they are made (docs/model.md 10)."""

    name: Literal["digits", "mnist", "emnist", "folder"] = "digits"
    """`digits` ships with the package; the others read `path`."""
    path: str = ""
    """MNIST or EMNIST file (npz, IDX, gzip), or the folder of images."""
    image_height: Pixels = 48
    """Pixels; for `folder`, the height of a training crop."""
    image_width: Pixels = 48
    """Pixels; for `folder`, the width of a training crop."""
    min_objects: Annotated[int, Field(ge=0, le=256)] = 1
    """Objects in a scene: uniform from here ..."""
    max_objects: Annotated[int, Field(ge=0, le=256)] = 9
    """... to here."""
    glyph_size: Annotated[int, Field(ge=4, le=256)] = 14
    """Side of the square patch that carries a glyph, pixels."""
    glyph_jitter: Annotated[int, Field(ge=0, le=64)] = 0
    """The side varies by up to this many pixels, both ways."""
    max_overlap: Unit = 0.5
    """A patch may cover this share of a glyph square of those placed before it, summed."""
    colour: Literal["white", "random"] = "white"
    """Of the glyphs; `random` draws a bright colour for each."""
    background: Literal["black", "random"] = "black"
    """`random` draws one dark colour for each image."""
    validation_images: Annotated[int, Field(ge=1, le=10**6)] = 1000
    """Scenes of the validation split; a folder's are its own files."""
    test_images: Annotated[int, Field(ge=1, le=10**6)] = 1000
    """Scenes of the test split, likewise."""
    seed: Seed = 0
    """Of the scenes and crops, and so of their order; `train.seed` is another."""

    def __post_init__(self) -> None:
        if self.min_objects > self.max_objects:
            raise ValueError(
                f"min_objects ({self.min_objects}) must not exceed max_objects ({self.max_objects})"
            )
        side = self.glyph_size + self.glyph_jitter
        if self.name != "folder" and side > min(self.image_height, self.image_width):
            raise ValueError(
                f"a glyph of {side} px does not fit an image of "
                f"{self.image_height}x{self.image_width} px"
            )
        if self.glyph_jitter >= self.glyph_size:
            raise ValueError(
                f"glyph_jitter ({self.glyph_jitter}) must be less than "
                f"glyph_size ({self.glyph_size})"
            )
        if self.name == "folder" and not self.path:
            raise ValueError("name = 'folder' needs path, the folder of images")


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class PrepareConfig:
    """Preparation of every image, in training and wherever the model is used."""

    black: Unit = 0.0
    """Intensity, as a share of the file's range, that becomes 0; all below it too."""
    white: Unit = 1.0
    """Intensity, as a share of the file's range, that becomes 1; all above it too."""

    def __post_init__(self) -> None:
        if self.black >= self.white:
            raise ValueError(f"black ({self.black:g}) must be less than white ({self.white:g})")


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class SPAIRConfig:
    """The model (docs/model.md 1-5). Widths are numbers of units, sizes are pixels."""

    kind: Literal["spair"] = "spair"
    cell: Annotated[int, Field(ge=2, le=64)] = 12
    """Side of a grid cell; its prime factors are the backbone's strides."""
    stride_order: Literal["ascending", "descending"] = "ascending"
    """Of the strides: 12 gives 2, 2, 3, or 3, 2, 2 as in the authors' later code, which costs less.
    """
    anchor: Positive = 48.0
    """The largest box side, pixels (a_h = a_w)."""
    object_size: Annotated[int, Field(ge=2, le=64)] = 14
    """Side of a glimpse and of a rendered object map, texels."""
    centre_min: Real = -0.5
    """b_min: how far a box centre may leave its cell to the top and left, in cells."""
    centre_max: Real = 1.5
    """b_max, likewise to the bottom and right, from the cell's own corner."""

    backbone_channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (128,)
    """Channels of the strided layers in order; the last holds for the layers left."""
    pointwise_kernel: Annotated[int, Field(ge=1, le=2)] = 1
    """Kernel of the backbone's three last layers: 1, or 2 as in Fig. 7."""
    features: Width = 100
    """Channels that the backbone gives each cell."""
    lateral: bool = True
    """Whether a cell sees its four neighbours that came before (main text, section 4.3)."""
    hidden: Width = 100
    """Units of both hidden layers of the where, depth and pres networks."""
    passthrough: Annotated[int, Field(ge=0, le=4096)] = 100
    """Features that the where network hands to depth, and depth to pres."""
    what: Width = 50
    """A, the dimensions of z_what."""
    encoder_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (512, 256)
    """Hidden layers of the glimpse encoder."""
    decoder_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (256, 512)
    """Hidden layers of the object decoder."""
    activation: Literal["relu", "celu"] = "relu"
    """Between the layers of every network but that of the background."""

    std_bias: Real = 0.0
    """Standard deviations are 2 sigmoid(raw) and raw starts here; -3 is .1."""
    size_bias: Real = 0.0
    """Initial mean of z_h and z_w; -.9 starts boxes at .29 of the anchor."""
    presence_bias: Real = 0.0
    """Initial log-odds of presence."""
    colour_scale: Positive = 2.0
    """Colour is sigmoid(colour_scale * logit)."""
    alpha_scale: Positive = 0.1
    """Alpha is sigmoid(alpha_scale * logit + alpha_bias)."""
    alpha_bias: Real = 5.0
    """Alpha starts near sigmoid(alpha_bias), .993: opaque."""
    importance_floor: NonNegative = 0.0025
    """Least importance of a texel: the authors' .01, whose sigmoid(-z_depth) is times 4."""

    background: Literal["black", "solid", "mode", "mlp"] = "black"
    """Black, one learned colour, the training images' commonest colour, or an MLP of the image."""
    temperature: Positive = 1.0
    """Of the Concrete relaxation of z_pres."""

    position_prior_std: Positive = 1.0
    """z_y, z_x ~ N(0, position_prior_std^2)."""
    size_prior_mean: Real = -2.1972
    """z_h, z_w ~ N(size_prior_mean, size_prior_std^2): a median side of 4.8 px."""
    size_prior_std: Positive = 0.5
    """Of the logits, before they are squashed."""
    odds_start: Odds = 1e6
    """s = 1 / (1 + odds): the prior on counts starts here, nearly flat ..."""
    odds_end: Odds = 0.0125
    """... and ends here: s = .98765."""
    odds_decay: Annotated[float, Field(ge=1.0, le=1e9)] = 1000.0
    """Exponential: updates for a factor of ten. Log-linear: updates from start to end."""
    odds_schedule: Literal["exponential", "log-linear"] = "exponential"

    box_contrast: Share = 0.0
    """Boxes that are reported are drawn, in whole pixels, round what stands out from the background
    by more than this share of what stands out most in the object: .5 for half the height of blurred
    ones; 0 reports z_where's own boxes, as the paper does."""
    likelihood_floor: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-9
    """Added inside the logarithms of the reconstruction term."""
    beta: Positive = 1.0
    """Weight of the where, depth and what KL terms."""

    def __post_init__(self) -> None:
        if not self.centre_min < self.centre_max:
            raise ValueError(
                f"centre_min ({self.centre_min}) must be less than centre_max ({self.centre_max})"
            )

    @property
    def told(self) -> bool:
        """Whether the model needs to know how many objects an image holds."""
        return False

    @property
    def strides(self) -> tuple[int, ...]:
        """The prime factors of `cell` in `stride_order`."""
        factors, rest = [], self.cell
        for prime in range(2, self.cell + 1):
            while rest % prime == 0:
                factors.append(prime)
                rest //= prime
        return tuple(factors if self.stride_order == "ascending" else reversed(factors))


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ConnCompConfig:
    """Connected components (docs/model.md 9): what differs from the background is an object.

    `train.steps` is the number of thresholds that are tried, from .01 to 3 in equal steps.
    """

    kind: Literal["conncomp"] = "conncomp"
    threshold: Literal["fit", "otsu"] | Annotated[float, Field(ge=0.0, le=3.0)] = "fit"
    """Distance to the background, summed over the channels, from which a pixel is an object's:
    fitted to known boxes as in the paper, by Otsu's rule, which needs none, or given."""
    criterion: Literal["ap", "count_accuracy", "count_error"] = "ap"
    """The figure on training images that the fitted threshold has to be best at."""
    images: Annotated[int, Field(ge=1, le=10**5)] = 1000
    """Training images that the threshold and the background are taken from."""
    background: Literal["black", "mode", "median", "given"] = "black"
    """Black, the commonest colour or the median of each channel, or `colour`."""
    colour: tuple[Unit, Unit, Unit] = (0.0, 0.0, 0.0)
    """Of the background "given": red, green, blue."""

    @property
    def told(self) -> bool:
        """Whether the model needs to know how many objects an image holds."""
        return False


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class AIRConfig:
    """The baselines AIR and DAIR (docs/model.md 7 and 8). Widths are numbers of units.

    The networks take images of one size alone, that of `data`.
    """

    kind: Literal["air", "dair"] = "air"
    """`air`: an LSTM that looks at the image. `dair`: a network without state that looks at the
    difference between the image and the canvas so far."""
    count: Literal["given", "inferred"] = "given"
    """`given`: the true number of objects is told, in training and after, as in the paper."""
    max_objects: Annotated[int, Field(ge=1, le=256)] = 3
    """Steps, and so objects, at most; given counts may be higher."""
    presence: Literal["concrete", "exact"] = "concrete"
    """How an inferred count trains. `concrete`: one relaxed draw a step, of which those after
    the stop are cut off, as in the released code. `exact`: the expectation over all counts."""
    object_size: Annotated[int, Field(ge=2, le=64)] = 14
    """Side of a glimpse and of an object map, texels."""
    grey: bool = False
    """Whether step networks see the mean of the three channels, which is a third of the work."""
    units: Width = 256
    """Units of the LSTM; outputs of the network that DAIR has instead."""
    difference_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (256, 256, 256, 256)
    """Hidden layers of that network, with ReLU between."""
    output_hidden: Width = 128
    """Hidden units, with ReLU, between that and the nine numbers of a step."""
    what: Width = 50
    """A, the dimensions of z_what."""
    encoder_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (512, 256)
    """Hidden layers of the glimpse encoder."""
    decoder_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (256, 512)
    """Hidden layers of the object decoder."""
    activation: Literal["softplus", "relu", "celu"] = "softplus"
    """In the glimpse encoder and the object decoder."""
    background: Literal["black"] = "black"
    """The canvas that objects add their light to."""

    std_bias: Real = 0.0
    """Standard deviations are exp(raw) and raw starts here; -2.3 is .1."""
    scale_bias: Real = 0.0
    """Initial mean of the scale's logits; -.9 starts boxes at .29 of the image's sides."""
    presence_bias: Real = 0.0
    """Initial log-odds of one more object."""
    presence_limit: Annotated[float, Field(gt=0.0, le=10.0)] = 10.0
    """Log-odds of one more object are clipped to this, both ways. Of `exact`, a lower one keeps
    the gradients of later steps alive, and makes the first objects do without the later ones."""
    colour_bias: Real = 0.0
    """Colour is sigmoid(logit + colour_bias): objects start grey at 0, dark below."""
    temperature: Positive = 1.0
    """Of the Concrete relaxation of z_pres."""

    scale_prior_mean: Real = -2.944
    """Of the logits of width and height as shares of the image: .05. This and the next two are
    the authors' for five digits; `presets` has those for other numbers."""
    scale_prior_std: Positive = 0.75
    """Likewise."""
    shift_prior_std: Positive = 0.5
    """Of the centre, N(0, shift_prior_std^2) before tanh."""
    odds_start: Odds = 1e4
    """The prior odds of one more object start here ..."""
    odds_end: Odds = 1.001e-6
    """... and end here: the authors' 1e-9, and the 1e-6 inside their logarithm."""
    odds_decay: Annotated[float, Field(ge=1.0, le=1e9)] = 3000.0
    """Exponential: updates for a factor of ten. Log-linear: updates from start to end."""
    odds_schedule: Literal["exponential", "log-linear"] = "exponential"

    box_contrast: Share = 0.0
    """Boxes that are reported hold, in whole pixels, what is lighter than this share of what is
    lightest in the object; 0 reports scale and shift as they are, as the paper does."""
    likelihood_floor: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-9
    """Added inside the logarithms of the reconstruction term."""
    beta: Positive = 1.0
    """Weight of the where and what KL terms."""

    @property
    def told(self) -> bool:
        """Whether the model needs to know how many objects an image holds."""
        return self.count == "given"


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """The loop (docs/model.md 6)."""

    seed: Seed = 0
    """Of initial weights and noise, and of which scenes of `data.seed` training takes."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    """Images in an update."""
    steps: Annotated[int, Field(ge=1, le=10**9)] = 300_000
    """Updates in all."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4
    """Of Adam, at the first update."""
    learning_rate_end: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4
    """Reached on a straight line at the last step."""
    clip_norm: NonNegative = 1.0
    """Global gradient norm; 0 does not clip."""
    gradient_noise: NonNegative = 0.001
    """Standard deviation of the noise added to every gradient after clipping ..."""
    gradient_noise_decay: Annotated[float, Field(ge=1.0, le=1e9)] = 1000.0
    """... divided by ten in so many updates."""
    training_wheels: Steps = 1000
    """Updates during which where, depth and pres get no gradient."""
    validation_every: Annotated[int, Field(ge=1, le=10**9)] = 1000
    """Updates between validations; each writes a checkpoint and a picture."""
    patience: Steps = 50_000
    """Stop after so many updates without a better validation; 0 never stops early."""
    select: Literal["elbo", "ap"] = "elbo"
    """What `best` means: the validation ELBO, which needs no labels, or AP paper
    (`ap_spair`), which the authors took."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of products and convolutions. `tf32`, for NVIDIA GPUs alone, keeps 10 bits behind the point.
    `bf16` computes SPAIR's backbone and decoder, and all networks of AIR and DAIR, in bfloat16 (7
    bits); weights, Adam, losses, the operators and SPAIR's cells from one to the next stay float32,
    as do validation and all commands. A CPU without instructions for bfloat16 is slower in it."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0 takes what torch would. Bits depend on it, so the run records it."""


ModelConfig = SPAIRConfig | AIRConfig | ConnCompConfig
"""What a model can be; `kind` says which, and is "spair" where it is absent."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Config:
    """A whole run."""

    preset: str = "paper"
    """The preset that this config was made from."""
    data: DataConfig = Field(default_factory=DataConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    model: ModelConfig = Field(default_factory=SPAIRConfig, discriminator="kind")
    train: TrainConfig = Field(default_factory=TrainConfig)

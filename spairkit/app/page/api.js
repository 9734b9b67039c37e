// Requests to the server that this page came from. A refusal becomes an Error with its message.

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("spairkit does not answer: it has ended, or is busy");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text.trim();
  try {
    message = JSON.parse(text).error ?? message;
  } catch {
    // the server answers some refusals in plain text
  }
  const error = new Error(message || `the server answers ${response.status}`);
  error.status = response.status;
  throw error;
}

export async function get(path, signal) {
  const response = await ask(path, { signal });
  return response.status === 202 ? null : response.json();
}

export async function send(method, path, body) {
  const options = { method, headers: { "Content-Type": "application/json" } };
  if (body !== undefined) options.body = JSON.stringify(body);
  return (await ask(path, options)).json();
}

export async function download(path, name) {
  const url = URL.createObjectURL(await (await ask(path)).blob());
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

"""The experiments of the SPAIR paper at any scale, next to its published results."""

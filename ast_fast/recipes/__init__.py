"""The recipes that come with the package: TOML files, read by `ast_fast.training.recipe`."""

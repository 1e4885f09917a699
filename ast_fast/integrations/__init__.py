"""AST of ast_fast inside other libraries: transformers, timm, HEAR; and exported for serving.

Each module imports its library when it is itself imported, and nothing here is imported by
`import ast_fast`.
"""

"""The seed API's import path. Everything lives in `kvlathe`."""

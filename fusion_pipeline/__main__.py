"""`python -m fusion_pipeline` is `fusion`."""

from fusion_pipeline.cli import main

if __name__ == "__main__":
    main()

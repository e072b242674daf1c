.PHONY: style quality test

style:  ## format and mend what can be mended
	ruff format .
	ruff check --fix .

quality:  ## what CI checks besides the tests
	ruff format --check .
	ruff check .
	mypy

test:
	python -m pytest

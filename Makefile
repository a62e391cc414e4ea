# What a contributor types. Library code is written in nbs/ and exported from there.
.PHONY: export run test check clean readme drawings setup faults labs slides site wheel
NB ?= nbs/*.ipynb

export:        ## notebooks → scenimefy/*.py
	nbdev_export

run:           ## execute notebooks in place, with outputs:  make run NB=nbs/06_losses.ipynb
	python tests/run_notebooks.py $(NB)
	nbdev_clean

test:          ## every notebook in a fresh kernel, then pytest
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	pytest tests

check: clean export test   ## what CI does
	git diff --exit-code -- scenimefy nbs

clean:         ## drop metadata that only makes diffs
	nbdev_clean

readme:        ## README.md from nbs/index.ipynb
	python tests/make_readme.py

drawings:      ## nbs/images/*.svg from the networks
	python tests/make_drawings.py

setup:         ## the install cell of every notebook, from settings.ini
	python tests/make_setup.py

faults:        ## nbs/faults.md from the marks at the tests
	python tests/make_faults.py

labs:          ## students' versions of the labs, and the table of the teacher's page
	python nbs/labs/teacher/make_labs.py
	python nbs/labs/teacher/make_labs.py --table

slides:        ## the slides of all labs, in _slides/
	python nbs/labs/teacher/make_labs.py --slides _slides

site:          ## the course as pages in _docs/html; needs pip install -e ".[site]"
	python site/book.py

wheel:
	python -m build

"""The generators that GGL searches: files.py reads them; biggan.py, biggan_files.py: BigGAN-deep."""

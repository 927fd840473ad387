"""Packagings of drafters other than our own, in and out: one small file each."""

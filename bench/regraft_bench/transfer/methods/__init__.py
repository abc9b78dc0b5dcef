"""The methods of the study's scenarios. Each takes a setting and returns what it measured:

transfers     plain training and the library's methods: what most scenarios compare
peers         what else one could do with a finished source
leads         ways of our own to find the permutation
cost          operations of each method
assumption    distances of two runs: assumption (P) and theorem A.1
landscape     lines and planes of loss
ensembles     several targets of one source
ports         a fine-tune moved to a new base
"""

"""Other methods on the same backbone, one small file each, from its paper; a new peer goes here.

May import the method (the files beside this folder), no other room.
"""

"""What each device of a mesh would hold and compute: counted on the meta device, where nothing is allocated."""

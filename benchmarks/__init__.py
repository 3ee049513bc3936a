"Speed and memory of this package, of the naive way and of TRL, on the same tokens."

"""Files of a store on a local disk or in an object store, behind one interface."""

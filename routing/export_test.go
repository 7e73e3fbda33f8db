package routing

// OpenMemory makes a store in memory for the contract suite, which cannot be
// imported by the tests of this package.
func OpenMemory() func() Store {
	site := newMemSite()
	return func() Store { return site.open() }
}

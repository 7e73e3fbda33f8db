package routing_test

import (
	"testing"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/storetest"
)

// The tests' own store keeps the contract, or they would show nothing.
func TestMemoryStoreContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() routing.Store {
		open := routing.OpenMemory()
		return func() routing.Store {
			s := open()
			t.Cleanup(func() { s.Close() })
			return s
		}
	})
}

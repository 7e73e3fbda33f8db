package etcdstore

import (
	"testing"
	"time"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/storetest"
)

// Frontends of one machine; Gone goes by their flocks.
func TestContract(t *testing.T) {
	c := newCluster(t, 1)
	storetest.Run(t, func(t *testing.T) func() routing.Store {
		opt := Options{Endpoints: c.urls(), Prefix: newPrefix()}
		path := t.TempDir()
		return func() routing.Store { return openStore(t, path, opt) }
	})
}

// Frontends of as many machines; Gone goes by their leases.
func TestContractLeased(t *testing.T) {
	c := newCluster(t, 1)
	storetest.Run(t, func(t *testing.T) func() routing.Store {
		opt := Options{Endpoints: c.urls(), Prefix: newPrefix(), Leased: true, Lease: 3 * time.Second}
		return func() routing.Store { return openStore(t, t.TempDir(), opt) }
	})
}

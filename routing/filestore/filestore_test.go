package filestore

import (
	"testing"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
	"github.com/posthouse/posthouse/routing/storetest"
)

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() routing.Store {
		path := t.TempDir()
		return func() routing.Store { return openStore(t, path) }
	})
}

// openStore opens one more store on path, as another process would.
func openStore(t testing.TB, path string) *Store {
	t.Helper()
	dir, err := statedir.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := dir.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

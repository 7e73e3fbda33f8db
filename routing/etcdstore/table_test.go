package etcdstore

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/posthouse/posthouse/routing"
)

// A field that a State gets has a place in the store.
func TestEveryFieldHasAPlace(t *testing.T) {
	state := reflect.TypeFor[routing.State]()
	for i := range state.NumField() {
		name := state.Field(i).Name
		_, inPart := reflect.TypeFor[part]().FieldByName(name)
		_, inTable := reflect.TypeFor[table]().FieldByName(name)
		if !inPart && !inTable {
			t.Errorf("State.%s is not stored", name)
		}
	}
}

func seed(n int) func(*routing.State) error {
	return func(s *routing.State) error {
		for i := range n {
			s.Roles[fmt.Sprintf("ma%05d", i)] = routing.Row{
				Members: []string{"mail-be-01a", "mail-be-01b"}, Active: "mail-be-01a", Epoch: 1, Phase: routing.PhaseOpen}
		}
		return nil
	}
}

// orphan is a change of all roles, like the burial of a frontend.
func orphan(s *routing.State) error {
	for name, row := range s.Roles {
		row.Residues = append(row.Residues, routing.Residue{Backend: row.Active, Frontend: "f1.abcdefgh", Since: time.Now(),
			Why: "the frontend ended without a goodbye"})
		s.Roles[name] = row
	}
	return nil
}

// The first Update seeds, one role changes, all roles change.
func TestManyRoles(t *testing.T) {
	c := newCluster(t, 1)
	for _, n := range []int{1000, 10_000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			opt := Options{Endpoints: c.urls(), Prefix: newPrefix()}
			a := openStore(t, t.TempDir(), opt)
			w := openStore(t, t.TempDir(), opt).Watch(t.Context())
			timed := func(what string, do func()) {
				begin := time.Now()
				do()
				t.Logf("%d roles: %s %v", n, what, time.Since(begin).Round(100*time.Microsecond))
			}
			timed("seed", func() { update(t, a, seed(n)) })
			timed("until the watch has them", func() {
				until(t, w, "the roles", func(s *routing.State) bool { return len(s.Roles) == n })
			})
			timed("change of one", func() {
				update(t, a, func(s *routing.State) error {
					row := s.Roles["ma00007"]
					row.Epoch++
					s.Roles["ma00007"] = row
					return nil
				})
			})
			timed("change of all", func() { update(t, a, orphan) })
			timed("until the watch has it", func() {
				until(t, w, "the residues", func(s *routing.State) bool { return len(s.Roles["ma00000"].Residues) == 1 })
			})
			fresh := openStore(t, t.TempDir(), opt)
			var got *routing.State
			timed("first Load", func() { got = load(t, fresh) })
			timed("next Load", func() { load(t, fresh) })
			if len(got.Roles) != n || got.Roles["ma00007"].Epoch != 2 || got.Revision != 3 {
				t.Errorf("%d roles, epoch %d, revision %d", len(got.Roles), got.Roles["ma00007"].Epoch, got.Revision)
			}
			update(t, a, bump) // sweeps what did not fit before
			noStrays(t, c, a)
		})
	}
}

// noStrays checks that what the table refers to is there, and nothing else.
func noStrays(t *testing.T, c cluster, s *Store) {
	t.Helper()
	resp, err := c.client().Get(within(t, patient), s.partsPrefix(), clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	load(t, s)
	if want := len(s.known().view.parts); len(resp.Kvs) != want {
		t.Errorf("%d parts are in etcd, the table has %d", len(resp.Kvs), want)
	}
}

// Writers whose changes do not fit into one transaction, at once.
func TestStagedChangesConflict(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	opt := Options{Endpoints: c.urls()}
	const writers, each, frontends = 4, 5, opsMax + 20
	stores := make([]*Store, writers)
	for i := range stores {
		stores[i] = openStore(t, t.TempDir(), opt)
	}
	var wg sync.WaitGroup
	for _, s := range stores {
		wg.Go(func() {
			for range each {
				if _, err := s.Update(within(t, patient), func(s *routing.State) error {
					s.Switches++
					for i := range frontends {
						s.Frontends[fmt.Sprint("f", i)] = routing.Frontend{BootID: fmt.Sprint(s.Switches)}
					}
					return nil
				}); err != nil {
					t.Errorf("Update: %v", err)
				}
			}
		})
	}
	wg.Wait()
	got := load(t, openStore(t, t.TempDir(), opt))
	if got.Switches != writers*each || len(got.Frontends) != frontends || got.Frontends["f0"].BootID != fmt.Sprint(writers*each) {
		t.Errorf("%d switches, %d frontends, %+v", got.Switches, len(got.Frontends), got.Frontends["f0"])
	}
	last := openStore(t, t.TempDir(), opt)
	for range 2 * writers { // 100 deletions at a time
		update(t, last, bump)
	}
	noStrays(t, c, last)
}

// Three roles, overrides and records that belong into one part each are too long
// for it, though one alone is not: all of them fit into etcd, and are read as they
// were.
func TestLongRows(t *testing.T) {
	t.Parallel()
	together := func(prefix string, parts uint32) (names []string) {
		for i := 0; len(names) < 3; i++ {
			h := fnv.New32a()
			name := fmt.Sprint(prefix, i)
			if h.Write([]byte(name)); h.Sum32()%parts == 0 {
				names = append(names, name)
			}
		}
		return names
	}
	const long = partMax / 2
	s := &routing.State{Revision: 1, Roles: map[string]routing.Row{}, Frontends: map[string]routing.Frontend{}, Overrides: map[string]string{},
		Backends: map[string]map[string]string{}, Settings: map[string]string{}}
	for _, name := range together("ma", roleParts) {
		s.Roles[name] = routing.Row{Members: []string{"a", "b"}, Active: "a", Epoch: 1, Phase: routing.PhaseOpen,
			Seen: routing.Seen{Users: []string{strings.Repeat("u", long)}}}
	}
	for _, name := range together("alice", overrideParts) {
		s.Overrides[name] = strings.Repeat("o", long)
	}
	for n := range uint64(3) {
		s.History = append(s.History, routing.SwitchRecord{Switch: routing.Switch{Number: n, Why: strings.Repeat("w", long)}})
	}
	hashes, raws, err := split(s)
	if err != nil {
		t.Fatal(err)
	}
	for h, raw := range raws {
		if len(raw) > partMax {
			t.Errorf("part %s has %d bytes", h, len(raw))
		}
	}
	raw, err := json.Marshal(table{Format: format, Revision: 1, Parts: hashes})
	if err != nil {
		t.Fatal(err)
	}
	v, err := newView(raw, 1, nil, raws)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(v.state, s) {
		t.Error("another table was read")
	}
}

// What etcd would not take is said before it is asked.
func TestTooLong(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	s := openStore(t, t.TempDir(), Options{Endpoints: c.urls()})
	_, err := s.Update(within(t, patient), func(s *routing.State) error {
		s.Roles["ma01"] = routing.Row{Active: strings.Repeat("a", 2<<20)}
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "does not fit into etcd") {
		t.Errorf("Update = %v", err)
	}
	if got := load(t, s).Revision; got != 0 {
		t.Errorf("revision %d", got)
	}
}

// A change by hand is no table, nor is one of the future.
func TestUntrusted(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	client := c.client()
	for name, spoil := range map[string]func(t *testing.T, s *Store){
		"part": func(t *testing.T, s *Store) {
			h := s.known().view.table.Parts[0]
			if _, err := client.Put(within(t, patient), s.partsPrefix()+h, `{"roles":{"ma00000":{"active":"evil"}}}`); err != nil {
				t.Fatal(err)
			}
		},
		"missing": func(t *testing.T, s *Store) {
			if _, err := client.Delete(within(t, patient), s.partsPrefix(), clientv3.WithPrefix()); err != nil {
				t.Fatal(err)
			}
		},
		"format": func(t *testing.T, s *Store) {
			if _, err := client.Put(within(t, patient), s.tableKey(), `{"format":2,"new":true}`); err != nil {
				t.Fatal(err)
			}
		},
		"rubbish": func(t *testing.T, s *Store) {
			if _, err := client.Put(within(t, patient), s.tableKey(), `rubbish`); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			opt := Options{Endpoints: c.urls(), Prefix: newPrefix()}
			s := openStore(t, t.TempDir(), opt)
			update(t, s, seed(10))
			spoil(t, s)
			fresh := openStore(t, t.TempDir(), opt)
			if state, err := fresh.Load(within(t, patient)); err == nil || !strings.Contains(err.Error(), "cannot be trusted") {
				t.Errorf("Load = %+v, %v", state, err)
			}
			if _, err := fresh.Update(within(t, patient), bump); err == nil {
				t.Error("and it was written")
			}
		})
	}
}

// How soon another process has a change.
func TestWatchLatency(t *testing.T) {
	c := newCluster(t, 1)
	opt := Options{Endpoints: c.urls()}
	a := openStore(t, t.TempDir(), opt)
	w := openStore(t, t.TempDir(), opt).Watch(t.Context())
	update(t, a, seed(100))
	var writes, took []time.Duration
	for i := range uint64(50) {
		begin := time.Now()
		update(t, a, bump)
		writes = append(writes, time.Since(begin))
		until(t, w, "the change", switches(i+1))
		took = append(took, time.Since(begin))
	}
	slices.Sort(writes)
	slices.Sort(took)
	t.Logf("median %v to write, %v from before the write until another process has it (worst %v)", writes[25], took[25], took[49])
	if took[25] > time.Second {
		t.Errorf("a change takes %v", took[25])
	}
}

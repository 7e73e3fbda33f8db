package directory

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"go.uber.org/goleak"

	"github.com/posthouse/posthouse/routing"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answer is a directory with one answer for all.
type answer struct {
	role string
	err  error
}

func (a answer) Lookup(context.Context, string) (routing.Entry, error) {
	return routing.Entry{User: "alice", Role: a.role}, a.err
}

// "Not found" and "could not tell" are different answers: the second is never
// turned into the first, whatever stands behind it.
func TestChain(t *testing.T) {
	down := errors.New("ldap is down")
	absent := answer{err: fmt.Errorf("map: %w", routing.ErrUnknownUser)}
	for name, c := range map[string]struct {
		chain Chain
		role  string
		err   error
	}{
		"first found wins":   {Chain{answer{role: "ma01"}, answer{role: "ma02"}}, "ma01", nil},
		"absent goes on":     {Chain{absent, answer{role: "ma02"}}, "ma02", nil},
		"absent everywhere":  {Chain{absent, absent}, "", routing.ErrUnknownUser},
		"doubt stops":        {Chain{absent, answer{err: down}, answer{role: "ma02"}}, "", down},
		"doubt at the end":   {Chain{absent, answer{err: down}}, "", down},
		"doubt first":        {Chain{answer{err: down}, absent}, "", down},
		"nobody to be asked": {Chain{}, "", errEmptyChain},
	} {
		t.Run(name, func(t *testing.T) {
			entry, err := c.chain.Lookup(t.Context(), "alice")
			if !errors.Is(err, c.err) || err == nil && entry.Role != c.role {
				t.Errorf("got %+v, %v; want %q, %v", entry, err, c.role, c.err)
			}
			if errors.Is(err, routing.ErrUnknownUser) != (c.err == routing.ErrUnknownUser) {
				t.Errorf("%v is taken for certainly absent", err)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (Chain{answer{role: "ma01"}}).Lookup(ctx, "alice"); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended context: %v", err)
	}
}

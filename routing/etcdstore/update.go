package etcdstore

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/posthouse/posthouse/routing"
)

// What one transaction may have in it; etcd's limits are 128 operations and
// 1.5 MiB.
const (
	opsMax   = 100
	bytesMax = 1 << 20
)

// proposal is a view that is to follow another.
type proposal struct {
	*view
	raws map[string][]byte // its parts
	mark string            // its entry in Writers
}

// Update implements routing.Store. An error that change did not return means
// that nothing was committed, unless it says that this is not known: etcd gave
// no answer then as long as ctx lasted, or 5 s if it has no deadline.
func (s *Store) Update(ctx context.Context, change func(*routing.State) error) (*routing.State, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// What was heard a moment ago is the newest table most of the time, and the commit
	// finds out. A refusal counts only if it is by the newest.
	var base *view
	isNewest := false
	if known := s.known(); time.Since(known.heard) < freshFor {
		base = known.view
	}
	for {
		if base == nil {
			var err error
			if base, err = s.newest(ctx); err != nil {
				return nil, err
			}
			isNewest = true
		}
		next, err := propose(base, change)
		if err != nil && !isNewest {
			base = nil
			continue
		}
		if err != nil {
			return nil, err
		}
		newest, done, err := s.commit(ctx, base, next)
		if err != nil {
			return nil, err
		}
		if done {
			return next.state, nil
		}
		base, isNewest = newest, true
	}
}

func (s *Store) newest(ctx context.Context) (*view, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	return s.read(ctx)
}

// propose applies change to a copy of base. What is committed is what readers
// will read, not what change may have kept a pointer to.
func propose(base *view, change func(*routing.State) error) (*proposal, error) {
	state := base.state.Clone()
	if err := change(state); err != nil {
		return nil, err
	}
	hashes, raws, err := split(state)
	if err != nil {
		return nil, err
	}
	p := &proposal{raws: raws, mark: rand.Text()[:16]}
	writers := append(slices.Clone(base.table.Writers), p.mark)
	raw, err := json.Marshal(table{
		Format: format, Revision: base.state.Revision + 1, Switches: state.Switches, Parts: hashes,
		Writers: writers[max(0, len(writers)-writersKept):],
	})
	if err != nil {
		return nil, fmt.Errorf("role table: %w", err)
	}
	p.view, err = newView(raw, 0, base.parts, raws)
	return p, err
}

// commit puts next in the place of base, with one comparison. If another
// commit was first, newest is what there is now.
func (s *Store) commit(ctx context.Context, base *view, next *proposal) (newest *view, done bool, err error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	before := s.known()
	puts, err := s.stage(ctx, base, next)
	if err != nil {
		return nil, false, err
	}
	deletes := s.obsolete(base, next, opsMax-len(puts))
	ops := append(puts, clientv3.OpPut(s.tableKey(), string(next.raw)))
	for _, h := range deletes {
		ops = append(ops, clientv3.OpDelete(s.partsPrefix()+h))
	}
	var resp *clientv3.TxnResponse
	tries := 0
	err = s.call(ctx, "writing the role table", func(ctx context.Context, c *clientv3.Client) (err error) {
		tries++
		resp, err = c.Txn(ctx).If(s.isStill(base)).Then(ops...).Else(clientv3.OpGet(s.tableKey())).Commit()
		return err
	})
	switch {
	case errors.Is(err, errUnanswered) && tries > 0:
		return nil, false, fmt.Errorf("it is not known whether the change was committed: %w", err)
	case err != nil:
		return nil, false, err
	case resp.Succeeded:
		next.mod = resp.Header.Revision
		s.learnAnswer(before, resp.Header, next.view)
		s.swept(base, next, deletes)
		return nil, true, nil
	}
	newest, err = s.resolve(ctx, before, resp.Header, resp.Responses[0].GetResponseRange().Kvs)
	if err != nil {
		return nil, false, maybe(tries, err)
	}
	if slices.Contains(newest.table.Writers, next.mark) {
		return nil, true, nil // a try that got no answer
	}
	if tries > 1 && newest.table.Revision > next.table.Revision+writersKept-1 {
		return nil, false, fmt.Errorf("it is not known whether the change was committed: %d commits later etcd answers", writersKept)
	}
	return newest, false, nil
}

func maybe(tries int, err error) error {
	if tries > 1 {
		return fmt.Errorf("it is not known whether the change was committed: %w", err)
	}
	return err
}

// isStill compares the table with a view of it, by its value: in a restored
// etcd the same revision may be another table.
func (s *Store) isStill(v *view) clientv3.Cmp {
	if v.raw == nil {
		return clientv3.Compare(clientv3.CreateRevision(s.tableKey()), "=", 0)
	}
	return clientv3.Compare(clientv3.Value(s.tableKey()), "=", string(v.raw))
}

// stage returns the puts of the parts that base does not have, to go into one
// transaction with the table. If they are too many or too long for that they
// are written before: nobody sees them until there is a table that has them.
func (s *Store) stage(ctx context.Context, base *view, next *proposal) (puts []clientv3.Op, err error) {
	size := 0
	var hashes []string
	for h, raw := range next.raws {
		if _, there := base.parts[h]; !there {
			puts = append(puts, clientv3.OpPut(s.partsPrefix()+h, string(raw)))
			hashes = append(hashes, h)
			size += len(raw)
		}
	}
	if len(puts) < opsMax && size <= bytesMax {
		return puts, nil
	}
	s.mu.Lock()
	for _, h := range hashes {
		s.strays[h] = struct{}{}
	}
	s.mu.Unlock()
	for len(puts) > 0 {
		n, size := 0, 0
		for n < min(len(puts), opsMax) && (n == 0 || size+len(puts[n].ValueBytes()) <= bytesMax) {
			size += len(puts[n].ValueBytes())
			n++
		}
		var resp *clientv3.TxnResponse
		if err := s.call(ctx, "writing parts of the role table", func(ctx context.Context, c *clientv3.Client) (err error) {
			resp, err = c.Txn(ctx).If(s.isStill(base)).Then(puts[:n]...).Commit()
			return err
		}); err != nil {
			return nil, err
		}
		if !resp.Succeeded {
			break // base is not the newest: the commit will say so
		}
		puts = puts[n:]
	}
	return nil, nil
}

// obsolete returns up to n parts that next does not have: those of base, and
// strays. The transaction that replaces the table may delete anything that is
// not in the new one, and no other may: whoever has staged a part based it on
// an older table, and will not commit.
func (s *Store) obsolete(base *view, next *proposal, n int) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []string
	take := func(h string) {
		if _, used := next.parts[h]; !used && len(found) < n && !slices.Contains(found, h) {
			found = append(found, h)
		}
	}
	for h := range base.parts {
		take(h)
	}
	for h := range s.strays {
		take(h)
	}
	return found
}

// swept takes note of what a commit has deleted, and has left.
func (s *Store) swept(base *view, next *proposal, deleted []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for h := range base.parts {
		s.strays[h] = struct{}{}
	}
	for h := range next.parts {
		delete(s.strays, h)
	}
	for _, h := range deleted {
		delete(s.strays, h)
	}
}

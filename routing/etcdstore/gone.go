package etcdstore

import (
	"context"
	"path"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/posthouse/posthouse/routing/statedir"
)

// Alive implements routing.Store: the lease has not run out.
func (s *Store) Alive(ctx context.Context, ids []string) ([]string, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	alive, err := s.list(ctx, s.aliveKey(""))
	if err != nil {
		return nil, err
	}
	var found []string
	for _, id := range ids {
		if slices.Contains(alive, id) {
			found = append(found, id)
		}
	}
	return found, nil
}

// Gone implements routing.Store. A frontend has ended if it ran on this
// machine, its flock can be had and its lease has run out. If Options.Leased,
// also if it joined and its lease has run out, wherever it ran; its ID cannot
// come back to life then. (After a change of leader etcd counts leases from
// the start: that errs on the safe side.) Of an ID that joined through s only
// others can say so.
func (s *Store) Gone(ctx context.Context, ids []string) ([]string, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	alive, err := s.list(ctx, s.aliveKey(""))
	if err != nil {
		return nil, err
	}
	silent := slices.DeleteFunc(slices.Clone(ids), func(id string) bool {
		return statedir.CheckID(id) != nil || slices.Contains(alive, id) || s.isOwn(id)
	})
	ended, err := s.probe(ctx, silent)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, id := range silent {
		isGone := slices.Contains(ended, id)
		if !isGone && s.opt.Leased {
			if isGone, err = s.declare(ctx, id); err != nil {
				return nil, err
			}
		}
		if isGone {
			found = append(found, id)
		}
	}
	return found, nil
}

// isOwn says whether id joined through s and, as far as s knows, lives.
func (s *Store) isOwn(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live.ids[id] != nil
}

// probe returns those of ids whose flock on this machine can be had.
func (s *Store) probe(ctx context.Context, ids []string) ([]string, error) {
	l, err := s.opt.Dir.Lock(ctx, frontendsLock, statedir.Shared)
	if err != nil {
		return nil, err
	}
	defer l.Unlock()
	return s.opt.Dir.ProbeFrontends(ids, false)
}

// declare writes down that an ID which joined has ended, if it is not alive.
func (s *Store) declare(ctx context.Context, id string) (bool, error) {
	var resp *clientv3.TxnResponse
	err := s.call(ctx, "finding out whether "+id+" has ended", func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Txn(ctx).If(
			clientv3.Compare(clientv3.CreateRevision(s.usedKey(id)), ">", 0),
			clientv3.Compare(clientv3.CreateRevision(s.aliveKey(id)), "=", 0),
		).Then(clientv3.OpTxn(
			[]clientv3.Cmp{clientv3.Compare(clientv3.Value(s.usedKey(id)), "!=", buried)},
			[]clientv3.Op{clientv3.OpPut(s.usedKey(id), buried)}, nil,
		)).Commit()
		return err
	})
	return err == nil && resp.Succeeded, err
}

// list returns the names below a prefix, oldest first.
func (s *Store) list(ctx context.Context, prefix string) ([]string, error) {
	var resp *clientv3.GetResponse
	if err := s.call(ctx, "asking which frontends live", func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(),
			clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
		return err
	}); err != nil {
		return nil, err
	}
	names := make([]string, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		names[i] = path.Base(string(kv.Key))
	}
	return names, nil
}

// sweep removes the oldest used/ID of those who are neither alive nor
// registered, if there are more than statedir.GoneKept. What would be proven
// by one that is missing is left to the operator.
func (s *Store) sweep(ctx context.Context, isRegistered func(id string) bool) error {
	used, err := s.list(ctx, s.usedKey(""))
	if err != nil || len(used) <= statedir.GoneKept {
		return err
	}
	alive, err := s.list(ctx, s.aliveKey(""))
	if err != nil {
		return err
	}
	var ops []clientv3.Op
	for _, id := range used[:min(len(used)-statedir.GoneKept, opsMax)] {
		if !isRegistered(id) && !slices.Contains(alive, id) {
			ops = append(ops, clientv3.OpDelete(s.usedKey(id)))
		}
	}
	if len(ops) == 0 {
		return nil
	}
	return s.call(ctx, "removing traces of frontends that have ended", func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Txn(ctx).Then(ops...).Commit()
		return err
	})
}

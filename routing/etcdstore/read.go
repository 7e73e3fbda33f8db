package etcdstore

import (
	"bytes"
	"context"
	"errors"
	"path"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/posthouse/posthouse/routing"
)

// knowledge is what a Store has seen of etcd: a hint for whoever reads or
// writes, and what watches deliver.
type knowledge struct {
	age     int    // grows when etcd went back in time
	cluster uint64 // etcd's ID of itself; 0 before the first answer
	rev     int64  // etcd's revision up to which everything is known
	view    *view  // the newest table; nil before the first answer
	heard   time.Time
	changed chan struct{}
}

// freshFor is how long what etcd has said is most probably the newest still.
const freshFor = time.Second

func (s *Store) known() knowledge {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.know
}

func (s *Store) tableKey() string    { return s.key("state", "table") }
func (s *Store) partsPrefix() string { return s.key("state", "parts") + "/" }

// Load implements routing.Store. An error means "could not tell"; only a table
// that does not exist is an empty one. Nobody edits the State: others get the
// same.
func (s *Store) Load(ctx context.Context) (*routing.State, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	v, err := s.read(ctx)
	if err != nil {
		return nil, err
	}
	return v.state, nil
}

// read returns the newest view, linearizably: one read of the table's key, and
// one of everything if there are parts in it that were never seen.
func (s *Store) read(ctx context.Context) (*view, error) {
	before := s.known()
	if before.view == nil {
		return s.readAll(ctx, before)
	}
	var resp *clientv3.GetResponse
	if err := s.call(ctx, "reading the role table", func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Get(ctx, s.tableKey())
		return err
	}); err != nil {
		return nil, err
	}
	return s.resolve(ctx, before, resp.Header, resp.Kvs)
}

// resolve makes a view of the table in a linearizable answer to a request that
// was sent when s knew before.
func (s *Store) resolve(ctx context.Context, before knowledge, head *etcdserverpb.ResponseHeader, table []*mvccpb.KeyValue) (*view, error) {
	raw, mod := tableOf(table)
	v := before.view
	if v == nil || v.mod != mod || !bytes.Equal(v.raw, raw) {
		var known map[string]part
		if v != nil {
			known = v.parts
		}
		var err error
		v, err = newView(raw, mod, known, nil)
		if errors.Is(err, errIncomplete) {
			return s.readAll(ctx, before)
		}
		if err != nil {
			return nil, err
		}
	}
	s.learnAnswer(before, head, v)
	return v, nil
}

// readAll is read without anything known.
func (s *Store) readAll(ctx context.Context, before knowledge) (*view, error) {
	var resp *clientv3.GetResponse
	if err := s.call(ctx, "reading the role table", func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Get(ctx, s.key("state")+"/", clientv3.WithPrefix())
		return err
	}); err != nil {
		return nil, err
	}
	var table []*mvccpb.KeyValue
	fresh := map[string][]byte{}
	for _, kv := range resp.Kvs {
		if string(kv.Key) == s.tableKey() {
			table = append(table, kv)
		} else {
			fresh[path.Base(string(kv.Key))] = kv.Value
		}
	}
	raw, mod := tableOf(table)
	v, err := newView(raw, mod, nil, fresh)
	if err != nil {
		return nil, untrustedIfIncomplete(err)
	}
	s.mu.Lock()
	for h := range fresh {
		if _, used := v.parts[h]; !used {
			s.strays[h] = struct{}{}
		}
	}
	s.mu.Unlock()
	s.learnAnswer(before, resp.Header, v)
	return v, nil
}

// untrustedIfIncomplete: what was read at once cannot lack a part.
func untrustedIfIncomplete(err error) error {
	if errors.Is(err, errIncomplete) {
		return untrusted(err)
	}
	return err
}

func tableOf(kvs []*mvccpb.KeyValue) (raw []byte, mod int64) {
	if len(kvs) == 0 {
		return nil, 0
	}
	return kvs[0].Value, kvs[0].ModRevision
}

// learnAnswer takes note of a view in a linearizable answer to a request that
// was sent when s knew before. Such an answer cannot be older than that,
// unless etcd was wiped, or restored from a backup.
func (s *Store) learnAnswer(before knowledge, head *etcdserverpb.ResponseHeader, v *view) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.know.age != before.age {
		return // the answer may be of the time before
	}
	why := ""
	switch old := before.view; {
	case before.cluster != 0 && head.ClusterId != before.cluster:
		why = "another cluster answers"
	case head.Revision < before.rev:
		why = "its revision is lower"
	case old != nil && v.mod < old.mod:
		why = "the role table is older, or is gone"
	case old != nil && v.mod == old.mod && v != old:
		why = "the role table is another"
	}
	s.know.cluster = head.ClusterId
	if why == "" {
		s.learnLocked(head.Revision, v)
		return
	}
	s.log.Error("etcd went back in time: wiped, or restored from a backup", zap.String("why", why),
		zap.Int64("etcd_revision", head.Revision), zap.Int64("etcd_revision_before", before.rev),
		zap.Uint64("revision", v.state.Revision))
	s.know.age++
	s.know.rev, s.know.view = 0, nil
	s.learnLocked(head.Revision, v)
}

// learnLocked takes note that v is the table as of rev.
func (s *Store) learnLocked(rev int64, v *view) {
	s.know.rev, s.know.heard = max(s.know.rev, rev), time.Now()
	if s.know.view != nil && v.mod <= s.know.view.mod {
		return
	}
	s.know.view = v
	close(s.know.changed)
	s.know.changed = make(chan struct{})
}

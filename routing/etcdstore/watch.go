package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/posthouse/posthouse/routing"
)

const (
	// checkEvery is how often the table is read although no watch reported a
	// change: a member that has frozen reports none, etcd 3.4 and 3.5 can lose
	// an event when they compact (etcd issue 18089), and one that went back in
	// time is silent until it has caught up.
	checkEvery = 2 * time.Second
	// retryAfter is the pause before a watch that ended is made anew.
	retryAfter = 200 * time.Millisecond
)

// Watch implements routing.Store. The channel is closed when s is closed, too.
// Nobody edits the States: others get the same.
func (s *Store) Watch(ctx context.Context) <-chan *routing.State {
	out := make(chan *routing.State)
	s.follow.Do(func() { _ = s.spawn(s.following) })
	if err := s.spawn(func() { s.deliver(ctx, out) }); err != nil {
		close(out)
	}
	return out
}

// deliver is the goroutine of one Watch.
func (s *Store) deliver(ctx context.Context, out chan<- *routing.State) {
	defer close(out)
	ctx, cancel := s.until(ctx)
	defer cancel()
	// What others committed before Watch was called is in the first State.
	for {
		_, err := s.newest(ctx)
		if err == nil {
			break
		}
		pause(ctx, retryAfter)
		if ctx.Err() != nil {
			return
		}
	}
	var sent *view
	for {
		know := s.known()
		offer := out
		if know.view == sent {
			offer = nil
		}
		select {
		case <-ctx.Done():
			return
		case offer <- know.view.state:
			sent = know.view
		case <-know.changed:
		}
	}
}

// following keeps what s knows up to date, for all Watches, until s is closed.
func (s *Store) following() {
	ctx, trouble := s.closed, false
	for ctx.Err() == nil {
		age := s.known().age
		v, err := s.newest(ctx)
		if err == nil {
			if trouble {
				s.log.Info("the role table can be read again", zap.Uint64("revision", v.state.Revision))
			}
			trouble = false
			err = s.followFrom(ctx, age)
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil && !trouble {
			trouble = true
			s.log.Warn("following the role table; trying on", zap.Error(err))
		}
		pause(ctx, retryAfter)
	}
}

// followFrom watches from what is known on until the watch ends, or is not to
// be trusted any more. An error is news; nil is not.
func (s *Store) followFrom(ctx context.Context, age int) error {
	client, err := s.connected(ctx)
	if err != nil {
		return err
	}
	know := s.known()
	if know.age != age {
		return nil // it went back since
	}
	// A member that is cut off from the others would be silent for ever.
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	var seen atomic.Int64
	seen.Store(know.view.mod)
	checked := make(chan struct{})
	defer func() { cancel(); <-checked }()
	go func() {
		defer close(checked)
		s.check(ctx, age, &seen)
		cancel()
	}()
	pending := map[string][]byte{}
	for resp := range client.Watch(ctx, s.key("state")+"/", clientv3.WithPrefix(), clientv3.WithRev(know.rev+1)) {
		if resp.CompactRevision != 0 {
			return nil // what is missing is read
		}
		if err := resp.Err(); err != nil {
			return fmt.Errorf("etcd at %s: watching the role table: %w", s.endpoints(), err)
		}
		if err := s.take(ctx, age, &resp, pending, &seen); err != nil {
			return err
		}
	}
	return nil
}

// take learns from the events of a watch. pending are parts that have come
// without a table that has them.
func (s *Store) take(ctx context.Context, age int, resp *clientv3.WatchResponse, pending map[string][]byte, seen *atomic.Int64) error {
	var table *clientv3.Event
	for _, e := range resp.Events {
		switch key := string(e.Kv.Key); {
		case key == s.tableKey():
			table = e
		case e.Type == mvccpb.Event_PUT && strings.HasPrefix(key, s.partsPrefix()):
			pending[path.Base(key)] = e.Kv.Value
		}
	}
	if table == nil {
		return nil
	}
	defer clear(pending)
	if table.Type == mvccpb.Event_DELETE {
		return errors.New("etcd: the role table was deleted")
	}
	know := s.known()
	v, err := newView(table.Kv.Value, table.Kv.ModRevision, know.view.parts, pending)
	switch {
	case errors.Is(err, errIncomplete): // older than what is known, or events were lost
		_, err = s.newest(ctx)
	case err == nil:
		s.learnEvent(age, v)
	}
	seen.Store(table.Kv.ModRevision)
	return err
}

// learnEvent takes note of a view that a watch reported, which began in age.
func (s *Store) learnEvent(age int, v *view) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.know.age == age {
		s.learnLocked(v.mod, v)
	}
}

// check reads the table now and then. It ends with ctx, or when the watch has
// not seen what a read before the last one saw, or when etcd went back.
func (s *Store) check(ctx context.Context, age int, seen *atomic.Int64) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for due := int64(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		v, err := s.newest(ctx)
		if s.known().age != age || seen.Load() < due {
			return
		}
		if err == nil {
			due = v.mod
		}
	}
}

package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/posthouse/posthouse/routing/statedir"
)

const (
	// frontendsLock is held exclusively while a frontend's lock file is made.
	frontendsLock = "frontends.lock"

	// buried is in used/ID, instead of who joined, once it was said that ID has
	// ended though its process may have not: its alive/ID cannot come back.
	buried = "gone"
)

// liveness is what keeps the IDs of a Store alive. Store.mu guards it.
type liveness struct {
	ids   map[string]*member // nil when closed
	lease clientv3.LeaseID
	// renewed is when the last renewal that succeeded was sent; lapsed is
	// before the first one, and after the lease was lost, the time of that.
	renewed, lapsed time.Time
	// busy is held by who renews the lease.
	busy    chan struct{}
	started bool
	// ended are the flocks of IDs that others were told have ended.
	ended []*statedir.Lock
}

// member is an ID that joined, or is about to.
type member struct {
	lock    *statedir.Lock // its flock on this machine; nil before
	joining bool           // within Join
	joined  bool           // Join said so
	leased  bool           // alive/ID is on the lease
}

func (s *Store) usedKey(id string) string  { return s.key("used", id) }
func (s *Store) aliveKey(id string) string { return s.key("alive", id) }

// Join implements routing.Store. The ID lives until Close or until the process
// has ended; to hosts other than this one, until its lease has run out too. An
// ID has 1 to 200 letters, digits and ._@:- in it. After an error the same ID
// may be tried again through s.
func (s *Store) Join(ctx context.Context, id string) error {
	if err := statedir.CheckID(id); err != nil {
		return err
	}
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	m, err := s.enter(id)
	if err != nil {
		return err
	}
	err = s.join(ctx, id, m)
	s.mu.Lock()
	defer s.mu.Unlock()
	m.joining = false
	switch {
	case s.live.ids == nil:
		if m.lock != nil {
			m.lock.Unlock()
		}
		return ErrClosed
	case err != nil && m.lock == nil:
		delete(s.live.ids, id)
	}
	m.joined = err == nil
	return err
}

// enter makes id one that is about to join, so that nobody else is.
func (s *Store) enter(id string) (*member, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live.ids == nil || s.ended {
		return nil, ErrClosed
	}
	m := s.live.ids[id]
	if m == nil {
		m = &member{}
		s.live.ids[id] = m
	}
	if m.joining || m.joined {
		return nil, fmt.Errorf("frontend ID %s lives", id)
	}
	m.joining = true
	return m, nil
}

func (s *Store) join(ctx context.Context, id string, m *member) error {
	v, err := s.read(ctx)
	if err != nil {
		return err
	}
	isRegistered := func(id string) bool {
		_, ok := v.state.Frontends[id]
		return ok
	}
	if isRegistered(id) {
		return fmt.Errorf("frontend ID %s is registered already", id)
	}
	if err := s.claim(ctx, id); err != nil {
		return err
	}
	if m.lock == nil {
		lock, err := s.createLock(ctx, id, isRegistered)
		if err != nil {
			return err
		}
		s.mu.Lock()
		m.lock = lock
		s.mu.Unlock()
	}
	if err := s.renew(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	leased, start := m.leased, !s.live.started
	s.live.started = true
	s.mu.Unlock()
	if !leased {
		return fmt.Errorf("frontend ID %s was said to have ended", id)
	}
	if start {
		if err := s.spawn(s.stayAlive); err != nil {
			return err
		}
	}
	if err := s.sweep(ctx, isRegistered); err != nil {
		s.log.Warn("removing traces of frontends that have ended", zap.Error(err))
	}
	return nil
}

// claim makes used/ID, which must not exist, or be of an earlier try of ours.
func (s *Store) claim(ctx context.Context, id string) error {
	var resp *clientv3.TxnResponse
	if err := s.call(ctx, "joining as "+id, func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(s.usedKey(id)), "=", 0)).
			Then(clientv3.OpPut(s.usedKey(id), s.mark)).Else(clientv3.OpGet(s.usedKey(id))).Commit()
		return err
	}); err != nil {
		return err
	}
	if !resp.Succeeded {
		if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) == 0 || string(kvs[0].Value) != s.mark {
			return fmt.Errorf("frontend ID %s was used before", id)
		}
	}
	return nil
}

func (s *Store) createLock(ctx context.Context, id string, isRegistered func(string) bool) (*statedir.Lock, error) {
	l, err := s.opt.Dir.Lock(ctx, frontendsLock, statedir.Exclusive)
	if err != nil {
		return nil, err
	}
	defer l.Unlock()
	return s.opt.Dir.CreateFrontend(id, isRegistered)
}

// stayAlive renews the lease until s is closed, also one that was lost.
func (s *Store) stayAlive() {
	trouble := false
	for wait := s.opt.Lease / 3; ; {
		pause(s.closed, wait)
		if s.closed.Err() != nil {
			return
		}
		ctx, cancel := context.WithTimeout(s.closed, s.opt.Lease/3)
		err := s.renew(ctx)
		cancel()
		wait = s.opt.Lease / 3
		if err != nil {
			wait = s.opt.Lease / 20
		}
		if (err != nil) != trouble && s.closed.Err() == nil {
			trouble = err != nil
			if trouble {
				s.log.Warn("renewing the lease; trying on", zap.Error(err))
			} else {
				s.log.Info("the lease is renewed again")
			}
		}
	}
}

// renew renews the lease, or gets a new one, and sees that every ID is on it.
func (s *Store) renew(ctx context.Context) error {
	select {
	case s.live.busy <- struct{}{}:
		defer func() { <-s.live.busy }()
	case <-ctx.Done():
		return s.unanswered(ctx, "renewing the lease", nil)
	}
	s.mu.Lock()
	lease := s.live.lease
	s.mu.Unlock()
	sent := time.Now()
	if lease != clientv3.NoLease {
		err := s.keepAlive(ctx, lease)
		switch {
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			s.log.Error("the lease has run out")
			s.lost()
			lease = clientv3.NoLease
		case err != nil:
			return err
		default:
			s.renewedAt(sent)
		}
	}
	if lease == clientv3.NoLease {
		sent = time.Now()
		var err error
		if lease, err = s.grant(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		s.live.lease = lease
		s.mu.Unlock()
	}
	for _, id := range s.absent() {
		if err := s.revive(ctx, id, lease); err != nil {
			return err
		}
	}
	s.renewedAt(sent)
	return nil
}

// keepAlive is one try. It is over in half of the time until the next renewal
// is due: the next one may meet a member that answers.
func (s *Store) keepAlive(ctx context.Context, lease clientv3.LeaseID) error {
	err := s.once(ctx, s.opt.Lease/6, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.KeepAliveOnce(ctx, lease)
		return err
	})
	if err != nil {
		return fmt.Errorf("etcd at %s: renewing the lease: %w", s.endpoints(), err)
	}
	return nil
}

func (s *Store) grant(ctx context.Context) (clientv3.LeaseID, error) {
	seconds := int64((s.opt.Lease + time.Second - 1) / time.Second)
	var resp *clientv3.LeaseGrantResponse
	err := s.call(ctx, "asking for a lease", func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Grant(ctx, seconds)
		return err
	})
	if err != nil {
		return clientv3.NoLease, err
	}
	return resp.ID, nil
}

// lost takes note that etcd has ended the lease, and with it alive/ID of all.
func (s *Store) lost() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live.lease = clientv3.NoLease
	s.live.renewed, s.live.lapsed = time.Time{}, time.Now()
	for _, m := range s.live.ids {
		m.leased = false
	}
}

// renewedAt takes note of a renewal that was sent at t, if all are on the
// lease who were told that they live.
func (s *Store) renewedAt(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	some := false
	for _, m := range s.live.ids {
		if m.joined && !m.leased {
			return
		}
		some = some || m.leased
	}
	if some {
		s.live.renewed = t
	}
}

// absent returns the IDs that have their flock, and are not on the lease.
func (s *Store) absent() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []string
	for id, m := range s.live.ids {
		if m.lock != nil && !m.leased {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// revive puts alive/ID on the lease, unless somebody was told that the ID has
// ended: that cannot be taken back, and its frontend needs another ID.
func (s *Store) revive(ctx context.Context, id string, lease clientv3.LeaseID) error {
	var resp *clientv3.TxnResponse
	if err := s.call(ctx, "showing that "+id+" lives", func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Txn(ctx).If(clientv3.Compare(clientv3.Value(s.usedKey(id)), "=", s.mark)).
			Then(clientv3.OpPut(s.aliveKey(id), s.mark, clientv3.WithLease(lease))).Commit()
		return err
	}); err != nil {
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			s.lost()
		}
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.live.ids[id]
	switch {
	case m == nil:
	case resp.Succeeded:
		m.leased = true
	default:
		s.log.Error("this frontend was said to have ended", zap.String("frontend", id))
		// The flock stays with the process: no sibling needs to think so too.
		delete(s.live.ids, id)
		s.live.ended = append(s.live.ended, m.lock)
	}
	return nil
}

// Deadline implements routing.Store: the zero time unless Options.Leased; then
// a quarter of the lease, but at least a second, before the lease can run out
// that was renewed last, counted from when that renewal was sent. The margin
// is for the rate of this clock against that of etcd's leader (less than 1 in
// 1000, even while one of them is slewed), and for closing what is open. Until
// the first Join, and when the lease is lost, it is in the past.
//
// It is on the monotonic clock, which stands still while the machine is
// suspended or its VM is paused: after that it comes too late, and nothing in
// this process can help.
func (s *Store) Deadline() time.Time {
	if !s.opt.Leased {
		return time.Time{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live.renewed.IsZero() {
		return s.live.lapsed
	}
	return s.live.renewed.Add(s.opt.Lease - max(s.opt.Lease/4, time.Second))
}

package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// standFor is how long one waits for another's key to go: after that one asks
// anew, since an event may be lost (see checkEvery).
const standFor = 15 * time.Second

// Campaign implements routing.Store. It goes on while etcd is away; office
// ends when the lease of the office was not renewed in time. resign takes a
// second at most, and if etcd does not answer the office is free when its
// lease has run out.
func (s *Store) Campaign(ctx context.Context) (office context.Context, resign func(), err error) {
	ctx, cancel := s.until(ctx)
	defer cancel()
	for {
		office, resign, err := s.stand(ctx)
		if err == nil {
			return office, resign, nil
		}
		if cause := context.Cause(ctx); cause != nil {
			if !errors.Is(err, cause) {
				err = fmt.Errorf("%w (%w)", err, cause)
			}
			return nil, nil, fmt.Errorf("waiting to become the driver: %w", err)
		}
		pause(ctx, retryAfter)
	}
}

// stand is one try to become the driver, on a lease of its own.
func (s *Store) stand(ctx context.Context) (office context.Context, resign func(), err error) {
	lease, err := s.grant(ctx)
	if err != nil {
		return nil, nil, err
	}
	client, err := s.connected(ctx)
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return nil, nil, ErrClosed
	}
	s.offices[lease] = struct{}{} // Close revokes it
	s.mu.Unlock()

	office, end := context.WithCancel(s.closed)
	resign = sync.OnceFunc(func() {
		end()
		s.mu.Lock()
		delete(s.offices, lease)
		s.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), farewell)
		defer cancel()
		_, _ = client.Revoke(ctx, lease)
	})
	session, err := concurrency.NewSession(client, concurrency.WithLease(lease), concurrency.WithContext(office))
	if err != nil {
		resign()
		return nil, nil, fmt.Errorf("etcd at %s: %w", s.endpoints(), err)
	}
	if err := s.elect(ctx, session); err != nil {
		resign()
		return nil, nil, err
	}
	if err := s.spawn(func() { <-session.Done(); end() }); err != nil {
		resign()
		return nil, nil, err
	}
	return office, resign, nil
}

// elect waits until the session is the first. When ctx ends, the library gives
// its place up without a bound: that is left behind.
func (s *Store) elect(ctx context.Context, session *concurrency.Session) error {
	elected := make(chan error, 1)
	if err := s.spawn(func() {
		ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), standFor)
		defer cancel()
		elected <- concurrency.NewElection(session, s.key("election")).Campaign(ctx, s.mark)
	}); err != nil {
		return err
	}
	select {
	case err := <-elected:
		return err
	case <-session.Done():
		return fmt.Errorf("etcd at %s: the lease to become the driver has run out", s.endpoints())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Package filestore keeps the role table in one file, for the frontends of
// one host.
//
//	table.json        the table; replaced by rename, under table.lock
//	table.lock        shared for who reads, exclusive for who writes
//	frontends/ID.lock held by the frontend ID for as long as it lives
//	driver.lock       held by the driver of switches
//
// A reader that sees a new table makes sure that it is on the disk before it
// acts on it, so that no power loss takes back what somebody acted on.
package filestore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

const (
	tableName  = "table.json"
	tableLock  = "table.lock"
	driverLock = "driver.lock"
)

// ErrClosed: the store was closed.
var ErrClosed = errors.New("store is closed")

// Store is a routing.Store. Two of them on one directory behave alike whether
// they are in one process or in two.
type Store struct {
	dir *statedir.Dir
	log *zap.Logger

	// closed ends when Close is called; stop ends it.
	closed  context.Context
	stop    context.CancelFunc
	watches sync.WaitGroup

	mu    sync.Mutex
	ended bool
	held  map[*statedir.Lock]struct{} // frontends' and the driver's
	// synced is the table that was last seen to be on the disk.
	synced []byte
}

var _ routing.Store = (*Store)(nil)

// Open returns the store in dir, which must stay open until Close. log may be nil.
func Open(dir *statedir.Dir, log *zap.Logger) (*Store, error) {
	if log == nil {
		log = zap.NewNop()
	}
	if err := os.Mkdir(filepath.Join(dir.Path(), frontends), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	s := &Store{dir: dir, log: log, held: map[*statedir.Lock]struct{}{}}
	s.closed, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// Close ends the liveness of every ID that joined through s, its campaigns
// and its watches. It waits for the watches only.
func (s *Store) Close() error {
	s.stop()
	s.mu.Lock()
	s.ended = true
	held := s.held
	s.held = nil
	s.mu.Unlock()
	for l := range held {
		l.Unlock()
	}
	s.watches.Wait()
	return nil
}

// keep makes Close give l up. The func returned gives it up before; it may be
// called more than once.
func (s *Store) keep(l *statedir.Lock) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		l.Unlock()
		return nil, ErrClosed
	}
	s.held[l] = struct{}{}
	return func() {
		s.mu.Lock()
		_, mine := s.held[l]
		delete(s.held, l)
		s.mu.Unlock()
		if mine {
			l.Unlock()
		}
	}, nil
}

// lock waits for a lock file until ctx ends or s is closed.
func (s *Store) lock(ctx context.Context, name string, mode statedir.Mode) (*statedir.Lock, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if s.closed.Err() != nil {
		return nil, ErrClosed
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer context.AfterFunc(s.closed, func() { cancel(ErrClosed) })()
	defer cancel(nil)
	l, err := s.dir.Lock(ctx, name, mode)
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("%w (%w)", err, context.Cause(ctx))
	}
	return l, err
}

// Load implements routing.Store. An error means "could not tell"; only a file
// that does not exist is an empty table.
func (s *Store) Load(ctx context.Context) (*routing.State, error) {
	raw, err := s.read(ctx)
	if err != nil {
		return nil, err
	}
	return decode(raw)
}

// read returns the bytes of a table that is on the disk for good; nil if
// there is none.
func (s *Store) read(ctx context.Context) ([]byte, error) {
	l, err := s.lock(ctx, tableLock, statedir.Shared)
	if err != nil {
		return nil, err
	}
	defer l.Unlock()
	return s.readLocked()
}

// readLocked is read by one who holds tableLock.
func (s *Store) readLocked() ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(s.dir.Path(), tableName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("role table: %w", err)
	}
	s.mu.Lock()
	known := bytes.Equal(raw, s.synced)
	s.mu.Unlock()
	if known {
		return raw, nil
	}
	// Who renamed it into place may have been killed before its fsync.
	if err := s.dir.Sync(); err != nil {
		return nil, fmt.Errorf("role table: %w", err)
	}
	s.setSynced(raw)
	return raw, nil
}

func (s *Store) setSynced(raw []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.synced = raw
}

// Update implements routing.Store. An error that change did not return means
// that nothing was committed, as far as the disk still obeys; after a power
// loss the change may turn out to be there all the same.
func (s *Store) Update(ctx context.Context, change func(*routing.State) error) (*routing.State, error) {
	l, err := s.lock(ctx, tableLock, statedir.Exclusive)
	if err != nil {
		return nil, err
	}
	defer l.Unlock()
	raw, err := s.readLocked()
	if err != nil {
		return nil, err
	}
	state, err := decode(raw)
	if err != nil {
		return nil, err
	}
	next := state.Revision + 1
	if err := change(state); err != nil {
		return nil, err
	}
	state.Revision = next
	raw, err = encode(state)
	if err != nil {
		return nil, err
	}
	// What was committed is what readers will read, not what change may have
	// kept a pointer to.
	if state, err = decode(raw); err != nil {
		return nil, err
	}
	if err := s.dir.WriteFile(tableName, raw); err != nil {
		return nil, fmt.Errorf("role table: %w", err)
	}
	s.setSynced(raw)
	return state, nil
}

// Campaign implements routing.Store. It notices within 0.1 s that the driver
// has gone.
func (s *Store) Campaign(ctx context.Context) (office context.Context, resign func(), err error) {
	l, err := s.lock(ctx, driverLock, statedir.Exclusive)
	if err != nil {
		return nil, nil, fmt.Errorf("waiting to become the driver: %w", err)
	}
	release, err := s.keep(l)
	if err != nil {
		return nil, nil, err
	}
	office, end := context.WithCancel(s.closed)
	return office, func() {
		end()
		release()
	}, nil
}

// Deadline implements routing.Store: a lock is held for as long as its process
// lives.
func (s *Store) Deadline() time.Time { return time.Time{} }

package statedir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Mode is how a lock is held.
type Mode int

// A lock has one exclusive holder or any number of shared ones.
const (
	Shared    Mode = unix.LOCK_SH
	Exclusive Mode = unix.LOCK_EX
)

// ErrLocked: somebody else holds the lock.
var ErrLocked = errors.New("locked by another process")

// Lock is a held flock(2). It is close-on-exec, ends with the process however
// that ends, and two of them exclude each other within one process too.
type Lock struct{ f *os.File }

// Lock waits for the lock file name, which it creates if need be, until ctx
// ends. Lock files are never renamed or removed while anybody may use them
// (safety 12). The waits between tries grow with the time waited, from 0.2 to
// 100 ms.
func (d *Dir) Lock(ctx context.Context, name string, mode Mode) (*Lock, error) {
	begin := time.Now()
	for {
		l, err := d.TryLock(name, mode)
		if !errors.Is(err, ErrLocked) {
			return l, err
		}
		pause := time.NewTimer(min(max(time.Since(begin)/8, 200*time.Microsecond), 100*time.Millisecond))
		select {
		case <-ctx.Done():
			pause.Stop()
			return nil, fmt.Errorf("%w: waited %v: %w", err, time.Since(begin).Round(time.Millisecond), ctx.Err())
		case <-pause.C:
		}
	}
}

// TryLock is Lock without waiting: ErrLocked if somebody else holds it.
func (d *Dir) TryLock(name string, mode Mode) (*Lock, error) {
	for {
		f, err := os.OpenFile(d.join(name), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		l := &Lock{f}
		if err := l.take(mode); err != nil {
			f.Close()
			return nil, err
		}
		same, err := l.isStill(d.join(name))
		if same {
			return l, nil
		}
		// Somebody removed the file by hand: a lock on it locks nobody out.
		f.Close()
		if err != nil {
			return nil, err
		}
	}
}

// CreateLock makes the lock file name, which must never have existed, and
// holds it exclusively: fs.ErrExist if it is there already. Callers hold
// another lock that keeps siblings from probing name meanwhile.
func (d *Dir) CreateLock(name string) (*Lock, error) {
	f, err := os.OpenFile(d.join(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	l := &Lock{f}
	if err := l.take(Exclusive); err != nil {
		f.Close()
		return nil, err
	}
	return l, nil
}

// IsHeld says whether a process holds the lock file name exclusively.
// fs.ErrNotExist if there is no such file.
func (d *Dir) IsHeld(name string) (bool, error) {
	f, err := os.Open(d.join(name))
	if err != nil {
		return false, err
	}
	l := &Lock{f}
	defer l.Unlock()
	// Shared, so that two who probe do not take each other for the holder.
	err = l.take(Shared)
	if errors.Is(err, ErrLocked) {
		return true, nil
	}
	return false, err
}

// Unlock gives the lock up. Only the first call does anything.
func (l *Lock) Unlock() {
	// Closing alone would leave it with a child that was forked a moment ago
	// and has not come to its exec yet.
	_ = unix.Flock(int(l.f.Fd()), unix.LOCK_UN)
	_ = l.f.Close()
}

func (l *Lock) take(mode Mode) error {
	for {
		err := unix.Flock(int(l.f.Fd()), int(mode)|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EWOULDBLOCK):
			return &fs.PathError{Op: "flock", Path: l.f.Name(), Err: ErrLocked}
		default:
			return &fs.PathError{Op: "flock", Path: l.f.Name(), Err: err}
		}
	}
}

// isStill says whether path still leads to the file that is locked.
func (l *Lock) isStill(path string) (bool, error) {
	held, err := l.f.Stat()
	if err != nil {
		return false, err
	}
	now, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(held, now), err
}

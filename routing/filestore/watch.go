package filestore

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

// pollEvery is how often a watch looks at the file although nobody reported a
// change; pollBlind if the kernel cannot report any.
const (
	pollEvery = time.Second
	pollBlind = 200 * time.Millisecond
)

// Watch implements routing.Store. The channel is closed when s is closed, too.
func (s *Store) Watch(ctx context.Context) <-chan *routing.State {
	out := make(chan *routing.State)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		close(out)
		return out
	}
	s.watches.Go(func() { s.watch(ctx, out) })
	return out
}

// watch is the goroutine of one Watch.
func (s *Store) watch(ctx context.Context, out chan<- *routing.State) {
	defer close(out)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.closed, cancel)()

	hints := newHints(s.dir.Path())
	defer hints.close()
	poll := time.NewTicker(hints.interval)
	defer poll.Stop()

	var seen table
	for {
		// The newest only: pending is what the reader has not taken yet.
		pending := seen.look(ctx, s)
		for again := false; !again; {
			var offer chan<- *routing.State
			if pending != nil {
				offer = out
			}
			select {
			case <-ctx.Done():
				return
			case offer <- pending:
				pending, seen.offered = nil, nil
			case event, ok := <-hints.events:
				again = !ok || filepath.Base(event.Name) == tableName
			case <-hints.errors: // events were lost
				again = true
			case <-poll.C:
				hints.renew()
				again = true
			}
		}
	}
}

// table is what a watch knows of the file.
type table struct {
	read    bool // at least once
	raw     []byte
	offered *routing.State // not taken yet
	trouble string         // why it could not be read, as the log has it
}

// look returns the State to offer: a new one, or the one that was not taken
// yet, or nil. A table that cannot be read changes nothing, and is logged once.
func (t *table) look(ctx context.Context, s *Store) *routing.State {
	raw, state, err := t.news(ctx, s)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		t.note(s.log, err)
	case t.trouble != "":
		t.trouble = ""
		s.log.Info("the role table can be read again")
	}
	if state != nil {
		t.read, t.raw, t.offered = true, raw, state
	}
	return t.offered
}

// news reads the file; state is nil if it is the one that was read last.
func (t *table) news(ctx context.Context, s *Store) (raw []byte, state *routing.State, err error) {
	// Not for ever: a new event may come while a stopped sibling has the lock.
	ctx, cancel := context.WithTimeout(ctx, pollEvery)
	defer cancel()
	raw, err = s.read(ctx)
	if err != nil || t.read && bytes.Equal(raw, t.raw) && (raw == nil) == (t.raw == nil) {
		return nil, nil, err
	}
	state, err = decode(raw)
	return raw, state, err
}

func (t *table) note(log *zap.Logger, err error) {
	why := err.Error()
	if errors.Is(err, statedir.ErrLocked) {
		why = statedir.ErrLocked.Error() // without how long it was waited for
	}
	if why != t.trouble {
		t.trouble = why
		log.Error("the role table cannot be read: going by the last one; trying on", zap.Error(err))
	}
}

// hints tell that something in a directory has changed: earlier than the poll
// does, if the kernel has a watch to give.
type hints struct {
	dir      string
	w        *fsnotify.Watcher // nil if there is none
	events   chan fsnotify.Event
	errors   chan error
	interval time.Duration // of the poll
}

// newHints watches the directory, not the file: the file is replaced by rename.
func newHints(dir string) hints {
	h := hints{dir: dir, interval: pollBlind}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return h
	}
	if err := w.Add(dir); err != nil {
		_ = w.Close()
		return h
	}
	h.w, h.events, h.errors, h.interval = w, w.Events, w.Errors, pollEvery
	return h
}

// renew follows a directory that was replaced. On the same one it does nothing.
func (h hints) renew() {
	if h.w != nil {
		_ = h.w.Add(h.dir)
	}
}

func (h hints) close() {
	if h.w != nil {
		_ = h.w.Close()
	}
}

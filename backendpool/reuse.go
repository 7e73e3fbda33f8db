package backendpool

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
)

// Reuse keeps connections to backends between transactions, and bounds how
// many each backend has open, in use and idle together. What it lends is a
// right to one connection: Get takes it, Put or Drop gives it back, each
// exactly once. It is safe for concurrent use. It keeps no goroutine.
type Reuse[C io.Closer] struct {
	most int
	idle time.Duration

	mu       sync.Mutex
	backends map[string]*berths[C]
	closed   bool
}

// berths are one backend's connections. While somebody waits, none is idle and
// the most are in use, because what is given back goes to who waits first.
type berths[C io.Closer] struct {
	inUse   int       // rights lent, and idle connections that are being closed
	idle    []kept[C] // by time, oldest first
	waiting []*turn[C]
	expiry  *time.Timer // runs whenever one is idle
}

// kept is an idle connection.
type kept[C io.Closer] struct {
	conn  C
	until time.Time
}

// turn is one Get that waits; conn and reused are set when ready is closed.
type turn[C io.Closer] struct {
	ready  chan struct{}
	conn   C
	reused bool
}

// NewReuse keeps up to most connections to each backend, in use and idle
// together (less than 1 counts as 1), and closes one that has been idle for
// that long; with an idle of 0 it keeps none, and only bounds them.
func NewReuse[C io.Closer](most int, idle time.Duration) *Reuse[C] {
	return &Reuse[C]{most: max(most, 1), idle: idle, backends: make(map[string]*berths[C])}
}

// berthsLocked returns the backend's berths.
func (r *Reuse[C]) berthsLocked(backend string) *berths[C] {
	b := r.backends[backend]
	if b == nil {
		b = &berths[C]{}
		r.backends[backend] = b
	}
	return b
}

// Get returns the backend's connection that became idle last, and true; or,
// where none is idle, the right to open one, and false. The caller owns the
// connection and must call Put or Drop. While most connections are in use, Get
// blocks until one is given back or ctx ends; who came first is served first.
func (r *Reuse[C]) Get(ctx context.Context, backend string) (c C, reused bool, err error) {
	r.mu.Lock()
	b := r.berthsLocked(backend)
	if last := len(b.idle) - 1; last >= 0 {
		c = b.idle[last].conn
		b.idle = slices.Delete(b.idle, last, last+1)
		if last == 0 {
			b.expiry.Stop()
		}
		b.inUse++
		r.mu.Unlock()
		return c, true, nil
	}
	if b.inUse < r.most {
		b.inUse++
		r.mu.Unlock()
		return c, false, nil
	}
	mine := &turn[C]{ready: make(chan struct{})}
	b.waiting = append(b.waiting, mine)
	r.mu.Unlock()

	select {
	case <-mine.ready:
		return mine.conn, mine.reused, nil
	case <-ctx.Done():
		r.forgo(backend, mine)
		return c, false, fmt.Errorf("backend %s: all %d connections (lmtp.max_connections) are in use: %w", backend, r.most, ctx.Err())
	}
}

// forgo gives up a turn, and what it was given in the same moment.
func (r *Reuse[C]) forgo(backend string, mine *turn[C]) {
	r.mu.Lock()
	b := r.berthsLocked(backend)
	i := slices.Index(b.waiting, mine)
	if i >= 0 {
		b.waiting = slices.Delete(b.waiting, i, i+1)
	}
	r.mu.Unlock()
	switch {
	case i >= 0:
	case mine.reused:
		r.Put(backend, mine.conn)
	default:
		r.Drop(backend)
	}
}

// serveLocked gives a right that somebody has given back to who waits first,
// with conn where reused; false if nobody waits.
func (b *berths[C]) serveLocked(conn C, reused bool) bool {
	if len(b.waiting) == 0 {
		return false
	}
	first := b.waiting[0]
	b.waiting = slices.Delete(b.waiting, 0, 1)
	first.conn, first.reused = conn, reused
	close(first.ready)
	return true
}

// Put gives a connection back, and the right with it: to who waits, or to be
// kept. The caller must not use it any more. After Close, or where none are
// kept, Put closes it, for as long as its Close blocks.
func (r *Reuse[C]) Put(backend string, c C) {
	r.mu.Lock()
	if r.closed || r.idle <= 0 {
		r.mu.Unlock()
		r.dispose(backend, []kept[C]{{conn: c}})
		return
	}
	defer r.mu.Unlock()
	b := r.berthsLocked(backend)
	if b.serveLocked(c, true) {
		return
	}
	b.inUse--
	b.idle = append(b.idle, kept[C]{c, time.Now().Add(r.idle)})
	switch {
	case b.expiry == nil:
		b.expiry = time.AfterFunc(r.idle, func() { r.expire(backend) })
	case len(b.idle) == 1:
		b.expiry.Reset(r.idle)
	}
}

// Drop gives back only the right: the caller has closed the connection, or has
// not opened one.
func (r *Reuse[C]) Drop(backend string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.berthsLocked(backend)
	var none C
	if !b.serveLocked(none, false) {
		b.inUse--
	}
}

// Fresh is for a caller whose reused connection proved dead: the backend has
// probably restarted, so all its idle connections are closed. The caller closes
// its own, keeps its right, and may open another. It blocks for as long as
// their Close does.
func (r *Reuse[C]) Fresh(backend string) {
	r.mu.Lock()
	b := r.berthsLocked(backend)
	old := b.takeLocked(len(b.idle))
	r.mu.Unlock()
	r.dispose(backend, old)
}

// Close closes all idle connections, and from then on those that are Put. Get
// goes on lending rights, for deliveries that are to be finished.
func (r *Reuse[C]) Close() {
	r.mu.Lock()
	r.closed = true
	old := make(map[string][]kept[C], len(r.backends))
	for backend, b := range r.backends {
		old[backend] = b.takeLocked(len(b.idle))
	}
	r.mu.Unlock()
	for backend, conns := range old {
		r.dispose(backend, conns)
	}
}

// expire closes the connections that have been idle for long enough.
func (r *Reuse[C]) expire(backend string) {
	r.mu.Lock()
	b, now := r.berthsLocked(backend), time.Now()
	n := 0
	for n < len(b.idle) && !b.idle[n].until.After(now) {
		n++
	}
	old := b.takeLocked(n)
	if len(b.idle) > 0 {
		b.expiry.Reset(b.idle[0].until.Sub(now))
	}
	r.mu.Unlock()
	r.dispose(backend, old)
}

// takeLocked takes the n oldest idle connections, which keep their rights
// until they are closed: a backend never has more than the most open.
func (b *berths[C]) takeLocked(n int) []kept[C] {
	old := slices.Clone(b.idle[:n])
	b.idle = slices.Delete(b.idle, 0, n)
	b.inUse += n
	if n > 0 && len(b.idle) == 0 {
		b.expiry.Stop()
	}
	return old
}

// dispose closes connections, and gives back the right of each.
func (r *Reuse[C]) dispose(backend string, old []kept[C]) {
	for _, k := range old {
		_ = k.conn.Close() // nobody uses it: there is nothing left to lose
		r.Drop(backend)
	}
}

// Counts returns how many of the backend's connections are in use, with those
// that are being opened or closed, and how many are idle.
func (r *Reuse[C]) Counts(backend string) (inUse, idle int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.backends[backend]
	if b == nil {
		return 0, 0
	}
	return b.inUse, len(b.idle)
}

// Check compares the counts with what they count, and returns what is wrong:
// a right that was lent twice, given back twice, or kept from who waits.
func (r *Reuse[C]) Check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, b := range r.backends {
		switch {
		case b.inUse < 0:
			return fmt.Errorf("backend %s: %d rights were given back that nobody had", name, -b.inUse)
		case b.inUse+len(b.idle) > r.most:
			return fmt.Errorf("backend %s: %d in use and %d idle are more than %d", name, b.inUse, len(b.idle), r.most)
		case len(b.waiting) > 0 && (b.inUse < r.most || len(b.idle) > 0):
			return fmt.Errorf("backend %s: %d wait though only %d of %d are in use", name, len(b.waiting), b.inUse, r.most)
		case (r.closed || r.idle <= 0) && len(b.idle) > 0:
			return fmt.Errorf("backend %s: %d are kept though none should be", name, len(b.idle))
		case !slices.IsSortedFunc(b.idle, func(x, y kept[C]) int { return x.until.Compare(y.until) }):
			return fmt.Errorf("backend %s: the idle ones are out of order", name)
		}
	}
	return nil
}

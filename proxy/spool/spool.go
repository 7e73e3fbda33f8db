// Package spool passes one message from one writer to several readers, each at
// its own pace, in bounded memory. What the slowest reader has not read goes
// to a file once it has stalled the others for too long, so that one slow
// backend neither stalls a delivery to the others nor fills the memory.
//
// A message begins in a ring of Memory octets, in which the writer waits for
// the slowest reader. Where that takes too long, the ring is left as it is, and
// all that follows goes to the file, from which every reader reads for itself.
// Where the file fails, all that follows goes to a new ring.
package spool

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"time"
)

// Memory is how many octets of a message are held for all its readers
// together. A reader of the file, and one that was closed inside a slice, costs
// that once more.
const Memory = 64 << 10

const (
	// small is what a message starts with: most never need more.
	small = 8 << 10
	// piece is the longest slice of the ring: the writer fills one half while
	// the reader sends the other.
	piece = Memory / 2
	// gulp: the writer goes on when so much has been read, not for each octet.
	// It is more than a final dot, so that the ring never holds half of one.
	gulp = 1 << 10
)

// ErrClosed is what Next returns after its Reader, or the Spool, was closed.
var ErrClosed = errors.New("spool: reader is closed")

var (
	errComplete = errors.New("spool: written to after the end of the message")
	errLate     = errors.New("spool: reader added after the first octet")
)

// Options of a Spool.
type Options struct {
	// Dir is where the file goes; it must be on a local file system. The file
	// has no name, so nothing of it outlives the process.
	Dir string
	// MaxLag is for how long, in sum over the message, readers that have read
	// everything may wait for the slowest before the message goes to the file;
	// with 0 it goes there at once. Readers that are all equally slow stall
	// nobody.
	MaxLag time.Duration
	// Disk, if set, bounds the files of all Spools that share it. Who finds it
	// full goes on in memory, as where the file fails: see Write.
	Disk *Disk
	// OnSpill is called once, by the writer, when the message goes to the
	// file. It may be nil.
	OnSpill func()
}

// Spool is one message on its way from one writer to several readers. Write
// and Commit are the writer's alone; Abort is safe from any goroutine.
type Spool struct {
	options Options

	mu      sync.Mutex
	arrived sync.Cond // readers wait here for octets
	readers []*Reader
	written int64 // octets so far
	end     int64 // position of Commit's first octet; MaxInt64 before
	whole   bool  // everything has been written
	aborted error
	closed  bool

	ring     ring
	ringFrom int64    // position of the ring's first octet
	pinned   bool     // who holds the writer back no more may still look into the ring
	retired  [][]byte // former rings, which somebody may still look into

	before   ring // holds the octets before fileFrom, once there is a file
	file     *os.File
	fileFrom int64
	fileTo   int64
	diskErr  error // why there is no file, or no more of it

	progress chan struct{} // not nil while the writer waits; closed to wake it
	stalled  time.Duration // how long readers have waited for the slowest
}

// New makes a spool for one message. The caller must Close it.
func New(o Options) *Spool {
	s := &Spool{options: o, end: math.MaxInt64}
	s.arrived.L = &s.mu
	return s
}

// NewReader adds a reader, which begins with the first octet. All readers are
// added before the first Write: the Next of a later one fails.
func (s *Spool) NewReader() *Reader {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &Reader{spool: s, err: s.aborted}
	if s.written > 0 || s.whole {
		r.err = errLate
	}
	s.readers = append(s.readers, r)
	return r
}

// Write appends p for all readers and keeps nothing of it. While the memory is
// full it waits: for a single reader until that reads or is closed, for the
// slowest of several only until MaxLag is used up. From then on the message
// goes to the file and Write waits for nobody. If the file cannot be created
// or written, the readers that need it fail with that error, and the others go
// on in memory. With no reader left the octets are discarded, because the
// message must be read from the MTA to its end whatever becomes of it. An
// error means that Write was called after Commit or Close.
func (s *Spool) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.whole || s.closed || s.end != math.MaxInt64 {
		return 0, errComplete
	}
	s.appendLocked(p)
	return len(p), nil
}

// Commit appends end, the final dot, and says that the message is complete. It
// waits as Write does. Only the first call counts.
func (s *Spool) Commit(end []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.end != math.MaxInt64 {
		return
	}
	s.end = s.written // before any octet of it can be read
	s.appendLocked(end)
	s.whole = true
	s.arrived.Broadcast()
}

// Abort makes every reader fail with err at once, whatever it has not read
// yet; readers that have failed or were closed before keep their error. What
// is written afterwards is discarded.
func (s *Spool) Abort(err error) {
	if err == nil {
		err = ErrClosed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.aborted != nil {
		return
	}
	s.aborted = err
	for _, r := range s.readers {
		s.endLocked(r, err)
	}
}

// Close gives back the memory and the file. The owner calls it once, when the
// writer and all readers are done; a slice that a reader still holds stays
// intact nevertheless.
func (s *Spool) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	held := false
	buffers := append(s.retired, s.ring, s.before)
	for _, r := range s.readers {
		s.endLocked(r, ErrClosed)
		held = held || r.viewed > 0
		buffers = append(buffers, r.own)
		r.own = nil
	}
	s.retired, s.ring, s.before = nil, nil, nil
	// A reader that did not come back after its last slice may still send it:
	// then the octets of another message must not get there.
	for _, b := range buffers {
		if !held {
			putBuffer(b)
		}
	}
	if s.file == nil {
		return nil
	}
	s.options.Disk.give(s.fileTo - s.fileFrom)
	if err := s.file.Close(); err != nil {
		return fmt.Errorf("close spool file: %w", err)
	}
	return nil
}

// appendLocked is Write's work. It gives up the lock while it waits and while
// it does file I/O.
func (s *Spool) appendLocked(p []byte) {
	for len(p) > 0 && s.anyLiveLocked() {
		var n int
		switch {
		case s.file != nil && s.diskErr == nil:
			n = s.toFileLocked(p)
		default:
			n = s.toRingLocked(p)
			if n > 0 {
				break
			}
			if s.stallsLocked() && s.stalled >= s.options.MaxLag {
				s.relieveLocked()
			} else {
				s.waitLocked()
			}
		}
		p = p[n:]
	}
}

// toRingLocked appends as much of p as there is room for; 0 if that is hardly
// worth it.
func (s *Spool) toRingLocked(p []byte) int {
	from := max(s.slowestLocked(), s.ringFrom)
	switch {
	case s.ring == nil:
		s.ring = getBuffer(len(p))
	case len(s.ring) < Memory && s.written-from+int64(len(p)) > int64(len(s.ring)):
		s.replaceRingLocked(from, Memory)
	case s.pinned:
		s.replaceRingLocked(from, len(s.ring))
	}
	s.pinned = false
	n := min(len(p), len(s.ring)-int(s.written-from))
	if n < min(len(p), gulp) {
		return 0
	}
	s.ring.put(p[:n], s.written)
	s.written += int64(n)
	s.arrived.Broadcast()
	return n
}

// replaceRingLocked goes on with a copy, because somebody may still look into
// the old one: it is not written to any more.
func (s *Spool) replaceRingLocked(from int64, size int) {
	old := s.ring
	s.ring = getBuffer(size)
	for at := from; at < s.written; {
		p := old.view(at, s.written)
		s.ring.put(p, at)
		at += int64(len(p))
	}
	s.retired = append(s.retired, old)
}

// toFileLocked appends p to the file. Where that fails, the message goes on in
// memory from what is in the file.
func (s *Spool) toFileLocked(p []byte) int {
	file, at := s.file, s.written-s.fileFrom
	s.mu.Unlock()
	var n int
	err := s.options.Disk.take(int64(len(p)))
	if err == nil {
		n, err = file.WriteAt(p, at)
		s.options.Disk.give(int64(len(p) - n))
	}
	s.mu.Lock()
	s.written += int64(n)
	s.fileTo = s.written
	if err != nil {
		s.diskErr = fmt.Errorf("write spool file in %s: %w", s.options.Dir, err)
		s.ringFrom = s.written
	}
	s.arrived.Broadcast()
	return n
}

// relieveLocked lets the message go on without the slowest readers: it goes to
// the file, or, where there can be none, they fail.
func (s *Spool) relieveLocked() {
	if s.diskErr == nil {
		s.spillLocked()
		return
	}
	s.stalled = 0
	slowest := s.slowestLocked()
	for _, r := range s.readers {
		if r.at == slowest {
			s.endLocked(r, s.diskErr)
		}
	}
}

// spillLocked makes the file, for which it gives up the lock. If that fails,
// nobody does yet: the slowest may have read on meanwhile.
func (s *Spool) spillLocked() {
	s.mu.Unlock()
	file, err := anonymousFile(s.options.Dir)
	if err == nil && s.options.OnSpill != nil {
		s.options.OnSpill()
	}
	s.mu.Lock()
	if err != nil {
		s.diskErr = fmt.Errorf("create spool file: %w", err)
		return
	}
	s.file, s.fileFrom, s.fileTo = file, s.written, s.written
	s.before, s.ring = s.ring, nil
	s.stalled = 0
}

// waitLocked waits until a reader does something, or MaxLag is used up while
// another reader starves. It gives up the lock meanwhile.
func (s *Spool) waitLocked() {
	progress := make(chan struct{})
	s.progress = progress
	if !s.stallsLocked() {
		s.mu.Unlock()
		<-progress
		s.mu.Lock()
		return
	}
	began := time.Now()
	late := time.NewTimer(s.options.MaxLag - s.stalled)
	s.mu.Unlock()
	select {
	case <-progress:
	case <-late.C:
	}
	late.Stop()
	s.mu.Lock()
	s.progress = nil
	s.stalled += time.Since(began)
}

// wakeWriterLocked tells a waiting writer that a reader did something.
func (s *Spool) wakeWriterLocked() {
	if s.progress != nil {
		close(s.progress)
		s.progress = nil
	}
}

// endLocked makes r fail with err, unless it has failed before. It no longer
// holds the writer back, but its user may not know yet and go on sending.
func (s *Spool) endLocked(r *Reader, err error) {
	if r.err != nil {
		return
	}
	r.err = err
	s.pinned = s.pinned || r.viewed > 0
	s.arrived.Broadcast()
	s.wakeWriterLocked()
}

func (s *Spool) anyLiveLocked() bool {
	for _, r := range s.readers {
		if r.err == nil {
			return true
		}
	}
	return false
}

// slowestLocked returns the position of the slowest live reader.
func (s *Spool) slowestLocked() int64 {
	slowest := s.written
	for _, r := range s.readers {
		if r.err == nil {
			slowest = min(slowest, r.at)
		}
	}
	return slowest
}

// stallsLocked: does a reader wait for what the writer cannot append?
func (s *Spool) stallsLocked() bool {
	for _, r := range s.readers {
		if r.starvesLocked() {
			return true
		}
	}
	return false
}

// Reader reads a Spool's message once, from its first octet.
type Reader struct {
	spool *Spool

	// Guarded by the spool's lock.
	at      int64 // what was read and is done with
	viewed  int   // octets from there on that the caller looks at
	waiting bool
	own     []byte // for reading the file
	err     error  // why it is not live any more
}

// Next blocks until there are octets and returns them, mostly without a copy;
// they must not be changed and are valid until the next call of Next, also if
// the reader is closed from elsewhere. last is true iff the slice holds any
// octet of the final dot (of what Commit was given), which comes in one slice
// where it lies in one piece. After everything comes io.EOF. Other errors are
// Abort's, ErrClosed, and those of the file. Calls must not overlap.
func (r *Reader) Next() (p []byte, last bool, err error) {
	s := r.spool
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.viewed > 0 {
		r.at += int64(r.viewed)
		r.viewed = 0
		s.wakeWriterLocked() // there is room, or from now on it stalls somebody
	}
	for r.err == nil && r.at == s.written && !s.whole {
		r.waiting = true
		s.arrived.Wait()
		r.waiting = false
	}
	switch {
	case r.err != nil:
		return nil, false, r.err
	case r.at == s.written:
		return nil, false, io.EOF
	case s.file != nil && r.at >= s.fileFrom && r.at < s.fileTo:
		p, err = r.readFileLocked()
	case s.file != nil && r.at < s.fileFrom:
		p = s.before.view(r.at, min(r.toLocked(piece), s.fileFrom))
	default:
		p = s.ring.view(r.at, r.toLocked(piece))
	}
	r.viewed = len(p)
	return p, r.at+int64(len(p)) > s.end, err
}

// toLocked returns where a slice of at most most octets ends. It does not cut
// into the final dot: that comes whole with the next one.
func (r *Reader) toLocked(most int64) int64 {
	s := r.spool
	to := min(s.written, r.at+most)
	if r.at < s.end && s.end < to && to < s.written {
		return s.end
	}
	return to
}

// readFileLocked reads from the file, for which it gives up the lock.
func (r *Reader) readFileLocked() ([]byte, error) {
	s := r.spool
	if r.own == nil {
		r.own = getBuffer(Memory)
	}
	p := r.own[:min(r.toLocked(Memory), s.fileTo)-r.at]
	file, at := s.file, r.at-s.fileFrom
	r.viewed = len(p) // the buffer is in use
	s.mu.Unlock()
	_, err := file.ReadAt(p, at)
	s.mu.Lock()
	if err != nil {
		s.endLocked(r, fmt.Errorf("read spool file in %s: %w", s.options.Dir, err))
	}
	if r.err != nil { // or closed meanwhile
		return nil, r.err
	}
	return p, nil
}

// Close detaches the reader: a pending or later Next fails with ErrClosed at
// once, and the writer does not wait for it. It is safe from any goroutine,
// any number of times.
func (r *Reader) Close() {
	r.spool.mu.Lock()
	defer r.spool.mu.Unlock()
	r.spool.endLocked(r, ErrClosed)
}

// starvesLocked: has it read everything and waits for more?
func (r *Reader) starvesLocked() bool {
	return r.err == nil && r.waiting && r.at == r.spool.written
}

package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var dot = []byte(".\r\n")

// message is n octets, in which no stretch looks like another.
func message(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(p)
	return p
}

// heard is what one reader got: the octets of the slices before the last ones,
// those of the last ones, and how it ended.
type heard struct {
	body, last []byte
	slices     int
	err        error
}

func (h *heard) all() []byte { return append(slices.Clone(h.body), h.last...) }

// drain reads r until it fails; between runs after each slice, while that is
// still valid.
func drain(r *Reader, between func()) *heard {
	h := &heard{}
	for {
		p, last, err := r.Next()
		if err != nil {
			h.err = err
			return h
		}
		if between != nil {
			between()
		}
		h.slices++
		switch {
		case last:
			h.last = append(h.last, p...)
		case len(h.last) > 0:
			h.err = errors.New("a slice that is not the last follows one that is")
			return h
		default:
			h.body = append(h.body, p...)
		}
	}
}

// send writes p in pieces of size and commits.
func send(t testing.TB, s *Spool, p []byte, size int) {
	t.Helper()
	for piece := range slices.Chunk(p, size) {
		if n, err := s.Write(piece); n != len(piece) || err != nil {
			t.Errorf("Write: %d, %v", n, err)
		}
	}
	s.Commit(dot)
}

// soFar is how many octets the writer got rid of.
func soFar(s *Spool) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written
}

// whole checks that h is all of the message and in good order.
func whole(t *testing.T, who string, h *heard, want []byte) {
	t.Helper()
	if h.err != io.EOF || !bytes.Equal(h.all(), append(slices.Clone(want), dot...)) {
		t.Errorf("the %s reader got %d and %d octets of %d, %v", who, len(h.body), len(h.last), len(want), h.err)
	}
	if !bytes.HasSuffix(h.last, dot) {
		t.Errorf("the %s reader's last slices are %d octets and not all of the dot", who, len(h.last))
	}
}

// empty checks that nothing with a name is in dir.
func empty(t *testing.T, dir string) {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func closed(t testing.TB, s *Spool) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestSmallMessageIsOneSlice(t *testing.T) {
	for _, size := range []int{0, 1, 4096, small - len(dot), small, 31 << 10} {
		body := message(size)
		s := New(Options{Dir: t.TempDir()})
		one, two := s.NewReader(), s.NewReader()
		send(t, s, body, 1000)
		for _, r := range []*Reader{one, two} {
			h := drain(r, nil)
			whole(t, "only", h, body)
			if h.slices != 1 {
				t.Errorf("%d octets came in %d slices", size, h.slices)
			}
		}
		closed(t, s)
	}
}

// A reader that knows that the dot is near must not have sent it before.
func TestOctetsBeforeTheDotAreNotTheLast(t *testing.T) {
	s := New(Options{})
	r := s.NewReader()
	_, _ = s.Write([]byte("hello\r\n"))
	if p, last, err := r.Next(); string(p) != "hello\r\n" || last || err != nil {
		t.Errorf("%q, %v, %v", p, last, err)
	}
	s.Commit(dot)
	if p, last, err := r.Next(); string(p) != ".\r\n" || !last || err != nil {
		t.Errorf("%q, %v, %v", p, last, err)
	}
	if _, _, err := r.Next(); err != io.EOF {
		t.Error(err)
	}
	closed(t, s)
}

func TestBriefStallIsBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, body := t.TempDir(), message(300<<10)
		s := New(Options{Dir: dir, MaxLag: time.Second, OnSpill: func() { t.Error("went to disk") }})
		fast, slow := s.NewReader(), s.NewReader()
		var atFast *heard
		var wg sync.WaitGroup
		wg.Go(func() { send(t, s, body, 5000) })
		wg.Go(func() { atFast = drain(fast, nil) })
		synctest.Wait()
		if n := soFar(s); n > Memory {
			t.Errorf("%d octets in memory", n)
		}
		began := time.Now()
		whole(t, "slow", drain(slow, func() { time.Sleep(80 * time.Millisecond) }), body)
		wg.Wait()
		whole(t, "fast", atFast, body)
		if took := time.Since(began); took < 500*time.Millisecond {
			t.Errorf("took %v: nothing held the writer back", took)
		}
		if s.file != nil {
			t.Error("there is a file")
		}
		closed(t, s)
	})
}

func TestLongStallGoesToDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, body, spills := t.TempDir(), message(1<<20+77), 0
		s := New(Options{Dir: dir, MaxLag: time.Second, OnSpill: func() { spills++ }})
		fast, slow := s.NewReader(), s.NewReader()
		began := time.Now()
		go send(t, s, body, 3000)
		h := drain(fast, nil)
		whole(t, "fast", h, body)
		if took := time.Since(began); took != time.Second || spills != 1 {
			t.Errorf("took %v, with %d spills", took, spills)
		}
		empty(t, dir)
		whole(t, "slow", drain(slow, nil), body)
		closed(t, s)
		closed(t, s)
		empty(t, dir)
	})
}

// A reader that trickles stalls the others no longer than one that is dead.
// Mutation: MaxLag that begins anew with each step of the slowest.
func TestTrickleGoesToDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body, spills := message(1<<20), 0
		s := New(Options{Dir: t.TempDir(), MaxLag: time.Second, OnSpill: func() { spills++ }})
		fast, slow := s.NewReader(), s.NewReader()
		var atSlow *heard
		var wg sync.WaitGroup
		wg.Go(func() { send(t, s, body, 3000) })
		wg.Go(func() { atSlow = drain(slow, func() { time.Sleep(900 * time.Millisecond) }) })
		began := time.Now()
		whole(t, "fast", drain(fast, nil), body)
		if took := time.Since(began); took != time.Second || spills != 1 {
			t.Errorf("took %v, with %d spills", took, spills)
		}
		wg.Wait()
		whole(t, "slow", atSlow, body)
		closed(t, s)
	})
}

// Where nobody waits for the slowest, a file would help nobody.
func TestEquallySlowReadersNeedNoFile(t *testing.T) {
	for readers := 1; readers <= 3; readers++ {
		synctest.Test(t, func(t *testing.T) {
			body := message(200 << 10)
			s := New(Options{Dir: t.TempDir(), OnSpill: func() { t.Error("went to disk") }})
			var wg sync.WaitGroup
			for range readers {
				r := s.NewReader()
				wg.Go(func() {
					whole(t, "slow", drain(r, func() { time.Sleep(time.Hour) }), body)
				})
			}
			send(t, s, body, 20_000)
			wg.Wait()
			closed(t, s)
		})
	}
}

// A reader may be closed while its user still sends: what that sends is not
// overwritten, because a dot at the wrong place would deliver half a message.
// Mutation: an endLocked that does not pin the ring.
func TestReaderClosedInTheMiddle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := message(300 << 10)
		s := New(Options{Dir: t.TempDir(), MaxLag: time.Hour, OnSpill: func() { t.Error("went to disk") }})
		stays, leaves := s.NewReader(), s.NewReader()
		var wg sync.WaitGroup
		wg.Go(func() { send(t, s, body, 7000) })
		var h *heard
		wg.Go(func() { h = drain(stays, nil) })
		synctest.Wait()
		p, _, err := leaves.Next()
		if err != nil || len(p) == 0 {
			t.Fatal(len(p), err)
		}
		synctest.Wait()
		leaves.Close()
		leaves.Close()
		wg.Wait()
		whole(t, "other", h, body)
		if !bytes.Equal(p, body[:len(p)]) {
			t.Error("the slice was overwritten")
		}
		if _, _, err := leaves.Next(); err != ErrClosed {
			t.Error(err)
		}
		closed(t, s)
	})
}

// The message is read to its end whatever happens to its readers.
func TestAllReadersClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Options{MaxLag: time.Second})
		one, two := s.NewReader(), s.NewReader()
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			send(t, s, message(1<<20), 7000)
		}()
		synctest.Wait()
		one.Close()
		two.Close()
		<-sent
		closed(t, s)
	})
}

func TestAbortWakesEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := errors.New("the MTA is gone")
		s := New(Options{Dir: t.TempDir(), MaxLag: time.Hour})
		waits, behind, left := s.NewReader(), s.NewReader(), s.NewReader()
		left.Close()
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			send(t, s, message(1<<20), 7000)
		}()
		woken := make(chan *heard)
		go func() { woken <- drain(waits, nil) }()
		synctest.Wait()
		s.Abort(gone)
		s.Abort(errors.New("once more"))
		if h := <-woken; h.err != gone || len(h.last) > 0 {
			t.Errorf("%v, %d octets", h.err, len(h.last))
		}
		<-sent
		if h := drain(behind, nil); h.err != gone || h.slices > 0 {
			t.Errorf("%v after %d slices", h.err, h.slices)
		}
		if _, _, err := left.Next(); err != ErrClosed {
			t.Error(err)
		}
		closed(t, s)
	})
}

func TestNoDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := message(500 << 10)
		s := New(Options{Dir: t.TempDir() + "/missing", MaxLag: time.Second, OnSpill: func() { t.Error("went to disk") }})
		fast, busy, slow := s.NewReader(), s.NewReader(), s.NewReader()
		var atFast, atBusy *heard
		var wg sync.WaitGroup
		wg.Go(func() { atFast = drain(fast, nil) })
		wg.Go(func() { atBusy = drain(busy, func() { time.Sleep(time.Millisecond) }) })
		wg.Go(func() { send(t, s, body, 7000) })
		wg.Wait()
		whole(t, "fast", atFast, body)
		whole(t, "busy", atBusy, body)
		if h := drain(slow, nil); !errors.Is(h.err, os.ErrNotExist) || !strings.Contains(h.err.Error(), "spool file") || h.slices > 0 {
			t.Errorf("%v after %d slices", h.err, h.slices)
		}
		closed(t, s)
	})
}

// The disk fills up while the message goes there: who has not read what is on
// it yet still can, and only one that stalls the others again fails.
func TestDiskFailsLater(t *testing.T) {
	for _, test := range []struct {
		name string
		back bool // the slow reader comes back in time
	}{{"and the slow reader comes back", true}, {"and the slow reader does not", false}} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir, body := t.TempDir(), message(900<<10)
				s := New(Options{Dir: dir, MaxLag: time.Second})
				fast, slow := s.NewReader(), s.NewReader()
				var atFast *heard
				var wg sync.WaitGroup
				wg.Go(func() { atFast = drain(fast, nil) })
				_, _ = s.Write(body[:400<<10])
				synctest.Wait()
				writable := s.file
				defer func() { _ = writable.Close() }()
				readOnly, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", writable.Fd()))
				if err != nil {
					t.Fatal(err)
				}
				s.mu.Lock()
				s.file = readOnly
				s.mu.Unlock()
				wg.Go(func() { send(t, s, body[400<<10:], 7000) })
				synctest.Wait()
				if n := soFar(s) - 400<<10; n < Memory-gulp {
					t.Errorf("only %d octets came into memory again", n)
				}
				var h *heard
				if test.back {
					h = drain(slow, nil)
				}
				wg.Wait()
				whole(t, "fast", atFast, body)
				if test.back {
					whole(t, "slow", h, body)
				} else if h = drain(slow, nil); h.err == nil || !strings.Contains(h.err.Error(), "write spool file in "+dir) {
					t.Error(h.err)
				}
				closed(t, s)
			})
		})
	}
}

// A file that cannot be read fails the reader, not the message.
func TestUnreadableFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := message(200 << 10)
		s := New(Options{Dir: t.TempDir(), MaxLag: time.Second})
		fast, slow := s.NewReader(), s.NewReader()
		go send(t, s, body, 7000)
		whole(t, "fast", drain(fast, nil), body)
		if err := s.file.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if h := drain(slow, nil); h.err == nil || !strings.Contains(h.err.Error(), "read spool file") || len(h.last) > 0 {
			t.Errorf("%v, %d last octets", h.err, len(h.last))
		}
		closed(t, s)
	})
}

// No octet of the end is in a slice that is not the last, wherever the pieces
// lie, in memory and on disk.
func TestLastHoldsTheDot(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		body := message(random.IntN(4 * Memory))
		if random.IntN(2) == 0 { // the ring is full when the end comes
			body = body[:min(len(body), Memory-random.IntN(2*len(dot)))]
		}
		s := New(Options{Dir: t.TempDir()})
		one, two := s.NewReader(), s.NewReader()
		if random.IntN(2) == 0 {
			two.Close()
		}
		go send(t, s, body, 1+random.IntN(2*Memory))
		h := drain(one, nil)
		whole(t, "first", h, body)
		if h.slices > 1 && len(h.body) < len(body)-Memory {
			t.Errorf("last from %d of %d", len(h.body), len(body))
		}
		if two.err == nil {
			whole(t, "second", drain(two, nil), body)
		}
		closed(t, s)
	}
}

// The dot comes in one slice, of which the ring's half-way mark, its end and a
// full ring are no excuse to send half.
func TestDotIsOneSlice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Options{})
		r := s.NewReader()
		send(t, s, message(piece-1), 1000)
		if h := drain(r, nil); h.slices != 2 || !bytes.Equal(h.last, dot) {
			t.Errorf("%d slices, last %q", h.slices, h.last)
		}
		closed(t, s)

		s = New(Options{})
		r = s.NewReader()
		_, _ = s.Write(message(Memory))
		_, _, _ = r.Next()
		_, _, _ = r.Next()
		go send(t, s, message(piece-1), piece) // one octet is free when the dot comes
		synctest.Wait()
		if h := drain(r, nil); h.err != io.EOF || !bytes.Equal(h.last, dot) {
			t.Errorf("last %q, %v", h.last, h.err)
		}
		closed(t, s)
	})
}

func TestReadersOfRandomSpeed(t *testing.T) {
	for seed := range uint64(8) {
		dir, body := t.TempDir(), message(1<<20)
		s := New(Options{Dir: dir, MaxLag: time.Duration(seed%3) * time.Millisecond})
		var wg sync.WaitGroup
		for i := range 4 {
			r, random := s.NewReader(), rand.New(rand.NewPCG(seed, uint64(i)))
			wg.Go(func() {
				h := drain(r, func() {
					for range random.IntN(1 + 100*i) {
						runtime.Gosched()
					}
				})
				whole(t, "random", h, body)
			})
		}
		leaver := s.NewReader()
		wg.Go(func() {
			for range seed {
				_, _, _ = leaver.Next()
			}
			leaver.Close()
		})
		wg.Go(func() { send(t, s, body, 500+int(seed)*3000) })
		wg.Wait()
		closed(t, s)
		empty(t, dir)
	}
}

func TestMemoryIsBounded(t *testing.T) {
	const size = 50 << 20
	s := New(Options{Dir: t.TempDir(), MaxLag: time.Millisecond})
	fast, never := s.NewReader(), s.NewReader()
	counted := make(chan int)
	go func() {
		n := 0
		for {
			p, _, err := fast.Next()
			if err != nil {
				counted <- n
				return
			}
			n += len(p)
		}
	}()
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	p, before, most := message(32<<10), heap(), int64(0)
	for n := 0; n < size; n += len(p) {
		_, _ = s.Write(p)
		if n%(10<<20) == 0 {
			most = max(most, heap()-before)
		}
	}
	s.Commit(dot)
	most = max(most, heap()-before)
	if n := <-counted; n != size+len(dot) {
		t.Errorf("the fast reader got %d octets", n)
	}
	if most > 1<<20 {
		t.Errorf("the heap grew by %d octets", most)
	}
	never.Close()
	closed(t, s)
}

// A user that was not waited for never sees octets of another message.
// Mutation: a Close that recycles every buffer.
func TestSliceOutlivesTheSpool(t *testing.T) {
	for range 50 {
		s := New(Options{})
		r := s.NewReader()
		send(t, s, []byte("for alice"), 100)
		p, _, _ := r.Next()
		r.Close()
		closed(t, s)
		next := New(Options{})
		next.NewReader()
		send(t, next, []byte("for bob: a secret"), 100)
		if string(p) != "for alice.\r\n" {
			t.Fatalf("alice's backend gets %q", p)
		}
		closed(t, next)
	}
}

func TestMisuse(t *testing.T) {
	s := New(Options{})
	early := s.NewReader()
	send(t, s, []byte("x"), 1)
	if _, err := s.Write([]byte("y")); err == nil {
		t.Error("written after Commit")
	}
	s.Commit([]byte("again"))
	if _, _, err := s.NewReader().Next(); err != errLate {
		t.Error(err)
	}
	whole(t, "early", drain(early, nil), []byte("x"))
	closed(t, s)
	if _, err := s.Write(nil); err == nil {
		t.Error("written after Close")
	}
	if _, _, err := early.Next(); err != ErrClosed {
		t.Error(err)
	}
}

// Some file systems know no O_TMPFILE.
func TestUnlinkedFile(t *testing.T) {
	dir := t.TempDir()
	file, err := unlinkedFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	empty(t, dir)
	if _, err := file.WriteString("x"); err != nil {
		t.Error(err)
	}
	if err := file.Close(); err != nil {
		t.Error(err)
	}
}

func BenchmarkSmallMessage(b *testing.B) {
	p, options := message(4096), Options{}
	b.ReportAllocs()
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		s := New(options)
		r := s.NewReader()
		_, _ = s.Write(p)
		s.Commit(dot)
		for {
			if _, _, err := r.Next(); err != nil {
				break
			}
		}
		_ = s.Close()
	}
}

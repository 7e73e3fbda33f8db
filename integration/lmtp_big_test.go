package integration

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestBigMessage: 200 MB for three recipients on three backends. posthouse's
// memory does not grow with the message, and what arrives is what was sent.
func TestBigMessage(t *testing.T) {
	t.Parallel()
	const size = 200 << 20
	e := newEstate(t)
	takesMail(e.site, "max_size: 300000000")
	e.fast = true // the race detector's own memory is not what is bounded here
	p := startFrontend(t, e.site)
	users := []string{"u0001", "u0011", "u0021"}
	rcpts := at("example.org", users...)

	l := mustDialLMTP(t, p.lmtp())
	warm := newParcel(rcpts...)
	said, err := l.deliver(sender, rcpts, warm.message())
	must(t, err)
	warm.record(rcpts, said)
	mustBeAccepted(t, []*parcel{warm})

	before := anonymousMemory(t, p.pid())
	stop, peak := make(chan struct{}), make(chan int64, 1)
	go func() { peak <- peakAnonymous(p.pid(), stop) }()
	m := newParcel(rcpts...)
	began := time.Now()
	sum := sendBig(t, l, m, size)
	took := time.Since(began)
	close(stop)
	highest := <-peak

	t.Logf("%d octets to three backends in %v; anonymous memory was %d kB before and %d kB at most", size, took.Round(time.Millisecond), before>>10, highest>>10)
	if highest == 0 {
		t.Fatal("the memory was never looked at")
	}
	if grown := highest - before; grown > 4<<20 {
		t.Errorf("posthouse grew by %d kB", grown>>10)
	}
	for _, user := range users {
		if got, err := bigSum(t, e.server(user).as(t, user), m.ownLine()); err != nil || got != sum {
			t.Errorf("%s: arrived with sum %x, sent with %x: %v", user, got, sum, err)
		}
	}
}

// sendBig delivers m with a body of about size octets, and returns the sum of
// the message.
func sendBig(t *testing.T, l *lmtp, m *parcel, size int) (sum [32]byte) {
	t.Helper()
	said, err := l.envelope(sender, m.rcpts)
	must(t, err)
	for _, r := range said {
		if !r.accepted() {
			t.Fatalf("RCPT: %v", r)
		}
	}
	_, err = l.command(lmtpLimit, "DATA")
	must(t, err)
	hash := sha256.New()
	chunk := []byte(lines(m.id, 780_000))
	both := io.MultiWriter(l, hash)
	m.body = ""
	_, err = io.WriteString(both, m.message())
	for sent := 0; err == nil && sent < size; sent += len(chunk) {
		_, err = both.Write(chunk)
	}
	must(t, err)
	must(t, l.say("."))
	said, err = l.replies(120*time.Second, len(m.rcpts))
	must(t, err)
	m.record(m.rcpts, said)
	mustBeAccepted(t, []*parcel{m})
	return [32]byte(hash.Sum(nil))
}

// bigSum is the sum of the newest message in INBOX from its own first line on.
func bigSum(t *testing.T, w *wire, own string) (sum [32]byte, err error) {
	t.Helper()
	_, _, err = w.imap(10*time.Second, "EXAMINE INBOX")
	must(t, err)
	must(t, w.say("big FETCH * (BODY.PEEK[])"))
	_, last, err := w.until(60*time.Second, "* 2 FETCH")
	must(t, err)
	m := literalAtEnd.FindStringSubmatch(last)
	if m == nil {
		return sum, fmt.Errorf("no literal: %s", last)
	}
	size, _ := strconv.ParseInt(m[1], 10, 64)
	w.SetReadDeadline(time.Now().Add(60 * time.Second))
	literal := io.LimitReader(w.r, size)
	var head strings.Builder // trace fields, octet by octet: there is little of them
	for !strings.HasSuffix(head.String(), own+"\r\n") {
		if _, err := io.CopyN(&head, literal, 1); err != nil {
			return sum, fmt.Errorf("%w before %q", err, own)
		}
	}
	if _, err := withoutTrace(head.String(), own); err != nil {
		return sum, err
	}
	hash := sha256.New()
	fmt.Fprintf(hash, "%s\r\n", own)
	if _, err := io.Copy(hash, literal); err != nil {
		return sum, err
	}
	return [32]byte(hash.Sum(nil)), nil
}

// peakAnonymous looks at a process every 100 ms until stop, and once more.
func peakAnonymous(pid int, stop <-chan struct{}) (peak int64) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		n, _ := rssAnon(pid)
		peak = max(peak, n)
		select {
		case <-tick.C:
		case <-stop:
			n, _ = rssAnon(pid)
			return max(peak, n)
		}
	}
}

func anonymousMemory(t *testing.T, pid int) int64 {
	t.Helper()
	n, err := rssAnon(pid)
	must(t, err)
	return n
}

// rssAnon is the memory that belongs to the process alone, in octets: without
// its program and what it has mapped.
func rssAnon(pid int) (int64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if rest, found := strings.CutPrefix(line, "RssAnon:"); found {
			n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("no RssAnon of %d", pid)
}

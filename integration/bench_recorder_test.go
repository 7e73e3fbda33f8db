//go:build bench

package integration

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// recorder is a backend that keeps thousands of sessions and does nothing but
// write down who is on it, from when to when: for what a real server is too large.
type recorder struct {
	host string

	mu     sync.Mutex
	visits []recorded
	inside map[string]int
}

// recorded is one session, from its login to the end of its connection.
type recorded struct {
	user     string
	from, to time.Time
}

func newRecorder(t testing.TB) *recorder {
	t.Helper()
	r := &recorder{host: nextHost(), inside: map[string]int{}}
	r.listen(t, "143", r.imap)
	r.listen(t, "110", func(c net.Conn, in *bufio.Scanner) {
		fmt.Fprint(c, "+OK ready\r\n")
		for in.Scan() {
			fmt.Fprint(c, "-ERR no\r\n")
		}
	})
	r.listen(t, "4190", func(c net.Conn, in *bufio.Scanner) {
		fmt.Fprint(c, "\"IMPLEMENTATION\" \"recorder\"\r\n\"SASL\" \"PLAIN\"\r\n\"SIEVE\" \"fileinto\"\r\nOK\r\n")
		for in.Scan() {
			fmt.Fprint(c, "OK\r\n")
		}
	})
	return r
}

func (r *recorder) backend() backend {
	return backend{host: r.host, style: "authzid", done: "logout", plain: true}
}

func (r *recorder) listen(t testing.TB, port string, serve func(net.Conn, *bufio.Scanner)) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(r.host, port))
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c, bufio.NewScanner(c))
			}()
		}
	}()
}

func (r *recorder) imap(c net.Conn, in *bufio.Scanner) {
	fmt.Fprint(c, "* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready\r\n")
	user, began := "", time.Time{}
	defer func() {
		if user != "" {
			r.mu.Lock()
			r.inside[user]--
			r.visits = append(r.visits, recorded{user, began, time.Now()})
			r.mu.Unlock()
		}
	}()
	for in.Scan() {
		words := strings.Fields(in.Text())
		if len(words) < 2 {
			return
		}
		switch strings.ToUpper(words[1]) {
		case "AUTHENTICATE":
			raw, _ := base64.StdEncoding.DecodeString(words[len(words)-1])
			user, began = strings.Split(string(raw), "\x00")[0], time.Now()
			r.mu.Lock()
			r.inside[user]++
			r.mu.Unlock()
			fmt.Fprintf(c, "%s OK [CAPABILITY IMAP4rev1] in\r\n", words[0])
		case "LOGOUT":
			fmt.Fprintf(c, "* BYE\r\n%s OK bye\r\n", words[0])
			return
		default:
			fmt.Fprintf(c, "%s OK done\r\n", words[0])
		}
	}
}

func (r *recorder) sessions() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, inside := range r.inside {
		n += inside
	}
	return n
}

// mustNeverBeOnBoth compares two recorders: no user's sessions on one overlap
// with those on the other.
func mustNeverBeOnBoth(t testing.TB, a, b *recorder) {
	t.Helper()
	byUser := map[string][]recorded{}
	for _, v := range b.visits {
		byUser[v.user] = append(byUser[v.user], v)
	}
	overlaps := 0
	for _, v := range a.visits {
		for _, w := range byUser[v.user] {
			if v.from.Before(w.to) && w.from.Before(v.to) {
				overlaps++
				if overlaps <= 5 {
					t.Errorf("%s was on both: %v–%v and %v–%v", v.user, v.from, v.to, w.from, w.to)
				}
			}
		}
	}
	if len(a.visits) == 0 || len(b.visits) == 0 {
		t.Error("nobody was on one of them")
	}
}

package integration

import (
	"bufio"
	"cmp"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// recorder is a backend that does nothing but write down who is on it, from when
// to when, and what mail it took: for what a real server is too large or too
// forgiving. It serves everybody, at any time, unless a demote hook has shut it
// for a role. What it records happens before the reply that proves it.
type recorder struct {
	name, host string
	roleOf     map[string]string // user → role

	mu      sync.Mutex
	visits  []recorded // those that have ended
	mail    []recorded // what it took: instants
	callers map[*caller]bool
	shut    map[string]bool     // roles
	asked   map[string]hookCall // role → the newest hook that was obeyed
	knocks  []string            // callers' addresses, who came while their role was shut
	dwell   chan struct{}       // nobody leaves by LOGOUT before it is closed; nil: at once
}

// recorded is one session, from its login to its end, or one delivery: from and to
// are the same then. A session whose connection ends inside a command has ended
// with the command before: what never gets complete is never executed.
type recorded struct {
	user, backend string
	from, to      time.Time
	message       string // of a delivery
}

// caller is one connection to a recorder.
type caller struct {
	net.Conn
	in    *bufio.Reader
	user  string // logged in, and not yet gone
	since time.Time
	last  time.Time // when the newest complete command had come
	half  bool      // inside a command
	rcpts []string  // users of the LMTP transaction
	ended bool      // by a hook: it has no effects any more
}

// hookCall orders the hooks of a role: a lower one is late.
type hookCall struct{ number, attempt int }

func newRecorder(t testing.TB, name, host string, roleOf map[string]string) *recorder {
	t.Helper()
	r := &recorder{name: name, host: host, roleOf: roleOf, callers: map[*caller]bool{}, shut: map[string]bool{}, asked: map[string]hookCall{}}
	r.listen(t, "143", r.imap)
	r.listen(t, "24", r.lmtp)
	r.listen(t, "110", func(c *caller) {
		fmt.Fprint(c, "+OK ready\r\n")
		for _, ok := c.line(); ok; _, ok = c.line() {
			fmt.Fprint(c, "-ERR no\r\n")
		}
	})
	r.listen(t, "4190", func(c *caller) {
		fmt.Fprint(c, "\"IMPLEMENTATION\" \"recorder\"\r\n\"SASL\" \"PLAIN\"\r\n\"SIEVE\" \"fileinto\"\r\nOK\r\n")
		for _, ok := c.line(); ok; _, ok = c.line() {
			fmt.Fprint(c, "OK\r\n")
		}
	})
	return r
}

func (r *recorder) backend() backend {
	return backend{host: r.host, style: "authzid", done: "logout", plain: true}
}

func (r *recorder) listen(t testing.TB, port string, serve func(*caller)) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(r.host, port))
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			c := &caller{Conn: conn, in: bufio.NewReader(conn)}
			r.mu.Lock()
			r.callers[c] = true
			r.mu.Unlock()
			go func() {
				defer r.hangUp(c)
				serve(c)
			}()
		}
	}()
}

// line is the next line without its end.
func (c *caller) line() (string, bool) {
	text, err := c.in.ReadString('\n')
	c.half = err != nil && text != ""
	return strings.TrimRight(text, "\r\n"), err == nil
}

// enter lets user in, unless a hook says otherwise.
func (r *recorder) enter(c *caller, user string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.ended || r.isShutLocked(c, user) {
		return false
	}
	c.user, c.since = user, time.Now()
	c.last = c.since
	return true
}

func (r *recorder) isShutLocked(c *caller, user string) bool {
	if !r.shut[r.roleOf[user]] {
		return false
	}
	host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	r.knocks = append(r.knocks, host)
	return true
}

func (r *recorder) leave(c *caller) {
	r.mu.Lock()
	dwell := r.dwell
	r.mu.Unlock()
	if dwell != nil {
		<-dwell
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaveLocked(c, time.Now())
}

// detain keeps whoever is or comes in from leaving in good order.
func (r *recorder) detain() (release func()) {
	dwell := make(chan struct{})
	r.mu.Lock()
	r.dwell = dwell
	r.mu.Unlock()
	return sync.OnceFunc(func() { close(dwell) })
}

func (r *recorder) leaveLocked(c *caller, at time.Time) {
	if c.user != "" {
		r.visits = append(r.visits, recorded{user: c.user, backend: r.name, from: c.since, to: at})
		c.user = ""
	}
}

func (r *recorder) hangUp(c *caller) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := time.Now()
	if c.half {
		at = c.last
	}
	r.leaveLocked(c, at)
	delete(r.callers, c)
	c.Close()
}

// take is the moment at which a message is there.
func (r *recorder) take(c *caller, user, message string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.ended {
		return false
	}
	now := time.Now()
	r.mail = append(r.mail, recorded{user: user, backend: r.name, from: now, to: now, message: message})
	return true
}

// expel ends whatever is under way for the role.
func (r *recorder) expelLocked(role string) {
	for c := range r.callers {
		if c.user != "" && r.roleOf[c.user] == role || slices.ContainsFunc(c.rcpts, func(user string) bool { return r.roleOf[user] == role }) {
			r.leaveLocked(c, time.Now())
			c.ended = true
			c.Close()
		}
	}
}

func (r *recorder) imap(c *caller) {
	fmt.Fprint(c, "* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready\r\n")
	for text, ok := c.line(); ok; text, ok = c.line() {
		words := strings.Fields(text)
		if len(words) < 2 {
			return
		}
		said := "OK done"
		switch strings.ToUpper(words[1]) {
		case "AUTHENTICATE":
			raw, _ := base64.StdEncoding.DecodeString(words[len(words)-1])
			said = "OK [CAPABILITY IMAP4rev1] in"
			if !r.enter(c, strings.Split(string(raw), "\x00")[0]) {
				said = "NO [UNAVAILABLE] shut"
			}
		case "APPEND":
			octets, _ := strconv.Atoi(strings.Trim(words[len(words)-1], "{}"))
			fmt.Fprint(c, "+ go on\r\n")
			message := make([]byte, octets+len("\r\n"))
			if _, err := io.ReadFull(c.in, message); err != nil {
				c.half = true
				return
			}
			if !r.take(c, c.user, field(string(message), "Subject: ")) {
				return
			}
		case "LOGOUT":
			r.leave(c)
			fmt.Fprintf(c, "* BYE\r\n%s OK bye\r\n", words[0])
			return
		}
		c.last = time.Now()
		fmt.Fprintf(c, "%s %s\r\n", words[0], said)
	}
}

// field is what follows name, where it begins a line.
func field(message, name string) string {
	_, rest, _ := strings.Cut("\n"+message, "\n"+name)
	value, _, _ := strings.Cut(rest, "\r\n")
	return value
}

func (r *recorder) lmtp(c *caller) {
	fmt.Fprint(c, "220 recorder ready\r\n")
	for text, ok := c.line(); ok; text, ok = c.line() {
		verb, argument, _ := strings.Cut(text, " ")
		switch strings.ToUpper(verb) {
		case "LHLO":
			fmt.Fprint(c, "250-recorder\r\n250-8BITMIME\r\n250-ENHANCEDSTATUSCODES\r\n250 PIPELINING\r\n")
		case "RCPT":
			_, address, _ := strings.Cut(argument, "<")
			fmt.Fprint(c, r.recipient(c, localPart(strings.Trim(address, ">"))))
		case "DATA":
			fmt.Fprint(c, "354 go on\r\n")
			if !r.deliver(c) {
				return
			}
		case "QUIT":
			fmt.Fprint(c, "221 2.0.0 bye\r\n")
			return
		default: // MAIL, RSET, NOOP
			r.mu.Lock()
			c.rcpts = nil
			r.mu.Unlock()
			fmt.Fprint(c, "250 2.0.0 OK\r\n")
		}
	}
}

func (r *recorder) recipient(c *caller, user string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.isShutLocked(c, user) {
		return "450 4.3.2 shut\r\n"
	}
	c.rcpts = append(c.rcpts, user)
	return "250 2.1.5 OK\r\n"
}

// deliver reads a message; false says that the connection is of no further use.
func (r *recorder) deliver(c *caller) bool {
	var message strings.Builder
	for {
		text, ok := c.line()
		if !ok {
			return false
		}
		if text == "." {
			break
		}
		message.WriteString(text + "\r\n")
	}
	for _, user := range c.rcpts {
		if !r.take(c, user, field(message.String(), "X-Parcel: ")) {
			return false
		}
		fmt.Fprint(c, "250 2.0.0 taken\r\n")
	}
	return true
}

// serveHooks is how hooks reach the recorder: /expel, /shut and /open, with the
// role, and the switch and its attempt.
func (r *recorder) serveHooks(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", r.host+":80")
	must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		role := q.FormValue("role")
		number, _ := strconv.Atoi(q.FormValue("switch"))
		attempt, _ := strconv.Atoi(q.FormValue("attempt"))
		r.mu.Lock()
		defer r.mu.Unlock()
		if last := r.asked[role]; number < last.number || number == last.number && attempt < last.attempt {
			http.Error(w, "too late", http.StatusConflict)
			return
		}
		r.asked[role] = hookCall{number, attempt}
		switch q.URL.Path {
		case "/shut":
			r.shut[role] = true
			r.expelLocked(role)
		case "/expel":
			r.expelLocked(role)
		case "/open":
			r.shut[role] = false
		}
	})}
	t.Cleanup(func() { server.Close() })
	go server.Serve(l)
}

// records is all that has happened, those included who are still there.
func (r *recorder) records() (visits, mail []recorded) {
	r.mu.Lock()
	defer r.mu.Unlock()
	visits, mail = slices.Clone(r.visits), slices.Clone(r.mail)
	for c := range r.callers {
		if c.user != "" {
			visits = append(visits, recorded{user: c.user, backend: r.name, from: c.since, to: time.Now()})
		}
	}
	return visits, mail
}

// onBoth finds who was on two backends at once; who tells which records belong
// together: a user's, or a role's.
func onBoth(all []recorded, who func(user string) string) []string {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b recorded) int { return a.from.Compare(b.from) })
	latest := map[string]map[string]recorded{} // who → backend → who stays there longest
	var found []string
	for _, v := range all {
		key := who(v.user)
		if latest[key] == nil {
			latest[key] = map[string]recorded{}
		}
		for backend, w := range latest[key] {
			if backend != v.backend && !w.to.Before(v.from) {
				found = append(found, fmt.Sprintf("%s: %v, and %v", key, w, v))
			}
		}
		if w, known := latest[key][v.backend]; !known || v.to.After(w.to) {
			latest[key][v.backend] = v
		}
	}
	return found
}

func (v recorded) String() string {
	const precise = "15:04:05.000000"
	if v.message != "" {
		return fmt.Sprintf("%s took %s for %s at %s", v.backend, v.message, v.user, v.from.Format(precise))
	}
	return fmt.Sprintf("%s on %s from %s to %s", v.user, v.backend, v.from.Format(precise), v.to.Format(precise))
}

// crossings counts how often those who belong together went from one backend to
// another.
func crossings(all []recorded, who func(user string) string) map[string]int {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b recorded) int { return cmp.Or(a.from.Compare(b.from), a.to.Compare(b.to)) })
	last, n := map[string]string{}, map[string]int{}
	for _, v := range all {
		key := who(v.user)
		if last[key] != "" && last[key] != v.backend {
			n[key]++
		}
		last[key] = v.backend
	}
	return n
}

// itself is who, where each user counts alone.
func itself(user string) string { return user }

// TestRecordersVerdict shows that the judgement can be other than "fine".
func TestRecordersVerdict(t *testing.T) {
	t.Parallel()
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	role := func(user string) string { return user[:1] }
	stay := func(user, backend string, from, to int) recorded {
		return recorded{user: user, backend: backend, from: at(from), to: at(to)}
	}
	for name, c := range map[string]struct {
		all                    []recorded
		users, roles, crossing int
	}{
		"one after the other":         {[]recorded{stay("u1", "a", 1, 3), stay("u1", "b", 4, 6), stay("u1", "a", 7, 8)}, 0, 0, 2},
		"at once":                     {[]recorded{stay("u1", "a", 1, 5), stay("u1", "b", 4, 6)}, 1, 1, 1},
		"behind a shorter one":        {[]recorded{stay("u1", "a", 1, 9), stay("u1", "a", 2, 3), stay("u1", "b", 4, 5)}, 1, 1, 1},
		"a delivery into a session":   {[]recorded{stay("u1", "b", 1, 5), stay("u1", "a", 3, 3)}, 1, 1, 1},
		"a delivery where none is":    {[]recorded{stay("u1", "b", 1, 2), stay("u1", "a", 3, 3), stay("u1", "b", 4, 5)}, 0, 0, 2},
		"two users of one role":       {[]recorded{stay("u1", "a", 1, 5), stay("u2", "b", 4, 6)}, 0, 1, 1},
		"two users of different ones": {[]recorded{stay("u1", "a", 1, 5), stay("v2", "b", 4, 6)}, 0, 0, 0},
	} {
		users, roles := len(onBoth(c.all, itself)), len(onBoth(c.all, role))
		if n := crossings(c.all, role)["u"]; users != c.users || roles != c.roles || n != c.crossing {
			t.Errorf("%s: users on both %d, roles on both %d, crossings %d; want %d, %d, %d", name, users, roles, n, c.users, c.roles, c.crossing)
		}
	}
}

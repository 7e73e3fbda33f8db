package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestSwitchesOfTwoPairs: three frontends on machines of their own, etcd between
// them, two mirrored Cyrus pairs with the shipped hooks, a role on each. Both roles
// go back and forth under clients that log in, append and read, and MTAs.
//
// No login is refused, nobody is on both sides of a pair, and whatever was
// acknowledged, by OK or by 250, is on the new active, under the UID that APPENDUID
// or a FETCH on whichever side had named.
func TestSwitchesOfTwoPairs(t *testing.T) {
	const rounds = 8
	l := newLan(t)
	users := userNames(8)
	pairs := []*mirrored{l.mirror(t, "ma01", "a", "b", users[:4]), l.mirror(t, "ma02", "c", "d", users[4:])}
	cluster, _ := l.etcd(t)
	s := newSite(t, backend{}, backend{}, users...).shared(cluster, "3s").takesMailFrom(l)
	s.roles, s.backends = map[string]string{}, map[string]backend{}
	for _, m := range pairs {
		for name, server := range m.servers {
			s.backends[name] = distant(server.backend())
		}
		for _, user := range m.users {
			s.users[user] = m.role
		}
		// The backends' hosts are the tests' own namespace, wherever the driver is.
		hooks := m.hooks.yaml("/usr/bin/nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", os.Getpid()))
		s.roles[m.role] = fmt.Sprintf("{members: [%s, %s], active: %s%s}", m.active, m.standby, m.active, hooks)
	}
	s.members, s.hooks = "a, b", strings.TrimSuffix(strings.TrimPrefix(s.roles["ma01"], "{members: [a, b], active: a"), "}")
	delete(s.roles, "ma01")
	w := &witness{users: users}
	for _, r := range l.frontends(t, s) {
		w.frontends = append(w.frontends, r.posthouse)
	}
	w.start(t)

	var took []time.Duration
	for i := range rounds {
		ends := map[*mirrored]chan switchResult{}
		for j, m := range pairs {
			p, ended := w.frontends[(i+j)%3], make(chan switchResult, 1)
			ends[m] = ended
			go func() {
				began := time.Now()
				stdout, stderr, code := p.cli(t, "switch", m.role, "--to", m.standby, "--reason", t.Name())
				ended <- switchResult{code, stdout + stderr, time.Since(began)}
			}()
		}
		seen := w.session()
		for m, ended := range ends {
			result := <-ended
			mustOpen(t, result)
			took = append(took, result.took)
			m.active, m.standby = m.standby, m.active
		}
		within(t, 60*time.Second, "everybody has been in and appended since", func() bool { return w.everybodySince(seen) || w.complained() })
	}
	w.stop()
	for _, complaint := range w.complaints {
		t.Error(complaint)
	}
	checked := 0
	for _, m := range pairs {
		checked += w.compare(t, m.servers[m.active], m.users)
		var both []*cyrus
		for _, server := range m.servers {
			both = append(both, server.cyrus)
		}
		mustNotOverlap(t, both[0], both[1])
	}
	t.Logf("%d switches of two Cyrus pairs; users on both 0 unless said above; %d messages acknowledged, %d UIDs compared; %d logins, refused %d; command to end: %s",
		len(took), len(w.acked), checked, w.logins, w.refused, inShort(took))
}

// mirrored is a pair with the shipped hooks.
type mirrored struct {
	role            string
	active, standby string
	users           []string
	servers         map[string]hookedCyrus
	hooks           *hookSite
}

// mirror lays out and starts a pair in the tests' own namespace, for a role and
// two backends of these names.
func (l *lan) mirror(t testing.TB, role, first, second string, users []string) *mirrored {
	t.Helper()
	ahost, bhost := l.server(t), l.server(t)
	a, b := newHookedCyrus(t, ahost, bhost), newHookedCyrus(t, bhost, ahost)
	m := &mirrored{role: role, active: first, standby: second, users: users, servers: map[string]hookedCyrus{first: a, second: b},
		hooks: newHookSite(t, "cyrus/posthouse-cyrus", a.etc(), b.etc(), "")}
	rename := strings.NewReplacer("\na.", "\n"+first+".", "\nb.", "\n"+second+".", "peer=a", "peer="+first, "peer=b", "peer="+second,
		"ma01", role, `"active":"a"`, `"active":"`+first+`"`)
	for _, file := range []string{"local.conf", "remote.conf", "table"} {
		path := filepath.Join(m.hooks.dir, file)
		writeFile(t, path, rename.Replace(readFile(t, path)))
	}
	for here, name := range map[string]string{"local": first, "remote": second} {
		runs(t, "", filepath.Join(m.hooks.dir, "systemctl"), name, here)
	}
	a.mustBe(t, "master")
	b.mustBe(t, "replica")
	a.createUsers(t, users...)
	for _, user := range users {
		a.mustReach(t, b, user)
	}
	return m
}

// witness is a number of clients and MTAs that remember what they were told.
type witness struct {
	frontends []*posthouse
	users     []string
	quit      chan struct{}
	once      sync.Once
	work      sync.WaitGroup

	mu         sync.Mutex
	serial     int
	appended   map[string]int    // by user: the serial number of the newest append
	uids       map[string]string // user and subject → UIDVALIDITY and UID
	acked      map[string]bool   // user and subject
	flagged    map[string]bool   // those of acked whose STORE was acknowledged
	logins     int
	refused    int
	complaints []string
	dying      *posthouse // a login that it refuses is no complaint
}

func (w *witness) start(t testing.TB) {
	w.quit, w.appended, w.uids = make(chan struct{}), map[string]int{}, map[string]string{}
	w.acked, w.flagged = map[string]bool{}, map[string]bool{}
	for i, user := range w.users {
		w.work.Go(func() { w.client(user, i) })
	}
	for _, p := range w.frontends {
		w.work.Go(func() { w.mta(p) })
	}
	t.Cleanup(w.stop)
}

func (w *witness) stop() {
	w.once.Do(func() { close(w.quit) })
	w.work.Wait()
}

func (w *witness) pause(d time.Duration) bool {
	select {
	case <-w.quit:
		return false
	case <-time.After(d):
		return true
	}
}

// session is the serial number of now; everybodySince asks for it later.
func (w *witness) session() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.serial
}

func (w *witness) everybodySince(serial int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !slices.ContainsFunc(w.users, func(user string) bool { return w.appended[user] <= serial })
}

func (w *witness) complained() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.complaints) > 0
}

// client logs in here and there, appends, reads what is new, and leaves or is
// sent away.
func (w *witness) client(user string, first int) {
	for n := first; w.pause(20 * time.Millisecond); n++ {
		p := w.frontends[n%len(w.frontends)]
		c, err := imapLogin(p.imap(), p.name, user, password, 30*time.Second)
		w.mu.Lock()
		if w.logins++; err != nil && p != w.dying {
			w.refused++
			w.complaints = append(w.complaints, fmt.Sprintf("%s at %s: %v", user, p.name, err))
		}
		w.mu.Unlock()
		if err == nil {
			w.reads(c, user)
			c.Close()
		}
	}
}

var (
	validityCode = regexp.MustCompile(`\[UIDVALIDITY (\d+)\]`)
	appendCode   = regexp.MustCompile(`\[APPENDUID (\d+ \d+)\]`)
)

// reads is one session's work, as long as it lasts.
func (w *witness) reads(c *wire, user string) {
	untagged, _, err := c.imap(20*time.Second, "SELECT INBOX")
	found := validityCode.FindStringSubmatch(strings.Join(untagged, "\n"))
	if err != nil || found == nil {
		return // sent away
	}
	for range 10 {
		w.mu.Lock()
		w.serial++
		serial := w.serial
		w.mu.Unlock()
		subject := fmt.Sprintf("append-%d", serial)
		if c.append(20*time.Second, "INBOX", subject) != nil {
			return
		}
		code := appendCode.FindStringSubmatch(c.log[len(c.log)-1])
		if code == nil {
			code = []string{"", "no APPENDUID"}
		}
		w.mu.Lock()
		w.acked[user+" "+subject], w.appended[user] = true, serial
		w.mu.Unlock()
		w.knows(user, map[string]string{subject: code[1]})
		_, uid, _ := strings.Cut(code[1], " ")
		if _, _, err := c.imap(20*time.Second, `UID STORE %s +FLAGS.SILENT (\Flagged)`, uid); err != nil {
			return
		}
		w.mu.Lock()
		w.flagged[user+" "+subject] = true
		w.mu.Unlock()
		untagged, _, err := c.imap(20*time.Second, "UID FETCH 1:* (UID BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
		if err != nil {
			return
		}
		w.knows(user, uidsOf(found[1], untagged))
		w.pause(100 * time.Millisecond)
	}
	c.imap(10*time.Second, "LOGOUT")
}

// uidsOf reads the answer to a FETCH: subject → UIDVALIDITY and UID. What was
// there twice is left out: which is which cannot be said.
func uidsOf(validity string, untagged []string) map[string]string {
	uids, uid := map[string]string{}, ""
	for _, line := range untagged {
		if m := uidItem.FindStringSubmatch(line); m != nil {
			uid = m[1]
		}
		if subject, found := strings.CutPrefix(line, "Subject: "); found {
			if _, twice := uids[subject]; twice {
				uid = "twice"
			}
			uids[subject] = validity + " " + uid
		}
	}
	maps.DeleteFunc(uids, func(_, uid string) bool { return strings.HasSuffix(uid, "twice") })
	return uids
}

// knows remembers under which UIDs messages were shown, and complains where that
// has changed.
func (w *witness) knows(user string, uids map[string]string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for subject, uid := range uids {
		if known, ok := w.uids[user+" "+subject]; ok && known != uid {
			w.complaints = append(w.complaints, fmt.Sprintf("%s %s had UID %s and has %s", user, subject, known, uid))
		}
		w.uids[user+" "+subject] = uid
	}
}

// mta delivers to two users at a time, and tries again until both have it.
func (w *witness) mta(p *posthouse) {
	l := &loader{address: p.lmtp()}
	var c *lmtp
	for n := 0; w.pause(100 * time.Millisecond); n++ {
		mail := newParcel(at("example.org", w.users[n%len(w.users)], w.users[(n+3)%len(w.users)])...)
		for len(mail.open()) > 0 && w.pause(30*time.Millisecond) {
			c = l.attempt(c, mail)
			w.mu.Lock()
			for _, rcpt := range mail.rcpts {
				if mail.last(rcpt).accepted() {
					w.acked[localPart(rcpt)+" "+mail.id] = true
				}
			}
			w.mu.Unlock()
		}
	}
	if c != nil {
		c.Close()
	}
}

// compare asserts that the active has whatever its users were told, under the same
// UIDs, and returns how many UIDs it compared.
func (w *witness) compare(t testing.TB, active mailServer, users []string) (uids int) {
	t.Helper()
	for _, user := range users {
		c := active.as(t, user)
		untagged, _, err := c.imap(10*time.Second, "EXAMINE INBOX")
		must(t, err)
		validity := validityCode.FindStringSubmatch(strings.Join(untagged, "\n"))
		if validity == nil {
			t.Fatalf("%s: no UIDVALIDITY: %q", user, untagged)
		}
		untagged, _, err = c.imap(30*time.Second, "UID FETCH 1:* (UID FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
		must(t, err)
		there, flagged, isFlagged := uidsOf(validity[1], untagged), map[string]bool{}, false
		for _, line := range untagged {
			if uidItem.MatchString(line) {
				isFlagged = strings.Contains(line, `\Flagged`)
			}
			if subject, found := strings.CutPrefix(line, "Subject: "); found {
				flagged[subject] = isFlagged
			}
		}
		for message := range w.acked {
			subject, ofUser := strings.CutPrefix(message, user+" ")
			if !ofUser {
				continue
			}
			has, known := there[subject], w.uids[message]
			if has == "" || known != "" && known != has {
				t.Errorf("acknowledged, and seen with UID %q: %s; on the active it has UID %q", known, message, has)
			}
			if known != "" {
				uids++
			}
			if w.flagged[message] && !flagged[subject] {
				t.Errorf("flagged, and on the active it is not: %s", message)
			}
		}
	}
	return uids
}

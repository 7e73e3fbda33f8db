package catchup

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"
	"github.com/emersion/go-sasl"

	"github.com/posthouse/posthouse/backendpool"
)

const (
	// maxAnswer bounds what a backend may say in answer to one step (one LIST,
	// a window of STATUS, a chunk of FETCH): go-imap's client has no limit on
	// lines and literals.
	maxAnswer = 32 << 20
	// maxMailboxes bounds what one user may have.
	maxMailboxes = 50_000
	// window is how many mailboxes are asked about at a time.
	window = 50
	// chunk is how many messages' flags are asked for at a time.
	chunk = 5000
)

// errRefused is a login that the backend has refused, in so many words.
var errRefused = errors.New("login refused")

// meter closes the tap when a backend says too much. refill says that what was
// said has been digested.
type meter struct {
	net.Conn
	left atomic.Int64
}

func newMeter(conn net.Conn) *meter {
	m := &meter{Conn: conn}
	m.refill()
	return m
}

func (m *meter) refill() { m.left.Store(maxAnswer) }

func (m *meter) Read(p []byte) (int, error) {
	if m.left.Load() <= 0 {
		return 0, fmt.Errorf("an answer of more than %d octets", maxAnswer)
	}
	n, err := m.Conn.Read(p)
	m.left.Add(-int64(n))
	return n, err
}

// imapSession is a user's session on one member.
type imapSession struct {
	client *imapclient.Client
	meter  *meter
	caps   imap.CapSet
	cyrus  bool
	sieve  string      // the ManageSieve service that goes with it; empty if there is none
	stop   func() bool // ends the watch over ctx
}

// openIMAP logs in as user; errRefused if the backend says that it does not
// let this user in. When ctx ends the connection is closed.
//
// A backend listens for the comparison as a replica only: where nobody listens
// there it may be the master, and is asked at its ordinary address.
func (c *Comparer) openIMAP(ctx context.Context, b *backendpool.Backend, user string) (*imapSession, error) {
	if b.Addresses[IMAPService] != "" {
		s, err := c.logInAt(ctx, b, IMAPService, SieveService, user)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return s, err
		}
	}
	return c.logInAt(ctx, b, "imap", "sieve", user)
}

func (c *Comparer) logInAt(ctx context.Context, b *backendpool.Backend, service, sieve, user string) (*imapSession, error) {
	conn, stop, release, err := c.open(ctx, b, service)
	if err != nil {
		return nil, err
	}
	defer release()
	if b.TLSOf(service) == backendpool.TLSStartTLS {
		if conn, err = secureIMAP(ctx, c.pool, b, service, conn); err != nil {
			stop()
			return nil, fmt.Errorf("backend %s: %w", b.Name, err)
		}
	}
	s := &imapSession{meter: newMeter(conn), stop: stop}
	if b.Addresses[sieve] != "" {
		s.sieve = sieve
	}
	s.client = imapclient.New(s.meter, nil)
	password := b.Password()
	if err = s.logIn(b, user, password); err == nil {
		c.prove(b, password)
		return s, nil
	}
	s.close()
	if errors.Is(err, errRefused) {
		return nil, err
	}
	return nil, fmt.Errorf("log in to backend %s: %w", b.Name, err)
}

// open takes a turn and a login slot, and connects. stop ends the watch over
// ctx that closes the connection; release gives the slot back.
func (c *Comparer) open(ctx context.Context, b *backendpool.Backend, service string) (conn net.Conn, stop func() bool, release func(), err error) {
	if err = c.takeTurn(ctx, b); err != nil {
		return nil, nil, nil, err
	}
	if release, err = b.Slot(ctx); err != nil {
		return nil, nil, nil, err
	}
	if conn, err = c.pool.Dial(ctx, b, service); err != nil {
		release()
		return nil, nil, nil, err
	}
	raw := conn
	return conn, context.AfterFunc(ctx, func() { _ = raw.Close() }), release, nil
}

// secureIMAP does STARTTLS by itself, because go-imap's client would hide what
// the pool says of a wrong certificate and has no way to be told that TLS has
// begun: it gets a greeting of ours instead of the one that was read here. On an
// error conn is closed.
func secureIMAP(ctx context.Context, pool *backendpool.Pool, b *backendpool.Backend, service string, conn net.Conn) (_ net.Conn, err error) {
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	r := bufio.NewReader(conn)
	line, err := r.ReadSlice('\n')
	if err != nil {
		return nil, fmt.Errorf("read the greeting: %w", err)
	}
	if !strings.HasPrefix(string(line), "* OK") {
		return nil, fmt.Errorf("greeting %q", line)
	}
	if _, err = io.WriteString(conn, "s STARTTLS\r\n"); err != nil {
		return nil, err
	}
	for untagged := 0; ; untagged++ {
		if line, err = r.ReadSlice('\n'); err != nil {
			return nil, fmt.Errorf("read the answer to STARTTLS: %w", err)
		}
		if untagged == 100 {
			return nil, errors.New("100 lines and no answer to STARTTLS")
		}
		if strings.HasPrefix(string(line), "s ") {
			break
		}
	}
	if !strings.HasPrefix(string(line), "s OK") {
		return nil, fmt.Errorf("STARTTLS: %q", line)
	}
	if r.Buffered() > 0 { // somebody in between has put words in (CVE-2011-0411)
		return nil, errors.New("plaintext behind the answer to STARTTLS")
	}
	secured, err := pool.Secure(ctx, b, service, conn)
	if err != nil {
		return nil, err
	}
	return &greeted{secured, strings.NewReader("* OK TLS has begun\r\n")}, nil
}

// greeted is a connection with a greeting put before it.
type greeted struct {
	net.Conn
	greeting *strings.Reader
}

func (g *greeted) Read(p []byte) (int, error) {
	if g.greeting.Len() > 0 {
		return g.greeting.Read(p)
	}
	return g.Conn.Read(p)
}

// logIn authenticates and finds out what the server can do.
func (s *imapSession) logIn(b *backendpool.Backend, user, password string) error {
	if err := s.client.WaitGreeting(); err != nil {
		return err
	}
	if s.client.State() != imap.ConnStateNotAuthenticated {
		return errors.New("greeting with PREAUTH: it is not this user's session")
	}
	err := s.client.Authenticate(sasl.NewPlainClient(credentials(b, user, password)))
	var no *imap.Error
	if errors.As(err, &no) && (no.Code == imap.ResponseCodeAuthenticationFailed || no.Code == imap.ResponseCodeAuthorizationFailed) {
		return fmt.Errorf("%w: %s", errRefused, no.Text)
	}
	if err != nil {
		return err
	}
	if s.caps = s.client.Caps(); s.caps == nil {
		return errors.New("the server does not say what it can do")
	}
	if !s.caps.Has(imap.CapListExtended) && !s.caps.Has(imap.CapIMAP4rev2) {
		return errors.New("the server has no LIST-EXTENDED: subscriptions cannot be compared")
	}
	if s.caps.Has(imap.CapID) {
		id, err := s.client.ID(nil).Wait()
		if err != nil {
			return fmt.Errorf("ID: %w", err)
		}
		s.cyrus = strings.HasPrefix(id.Name, "Cyrus")
	}
	return nil
}

// logOut waits until the server has ended the session: nothing of the
// comparison is at work on it any more.
func (s *imapSession) logOut() error {
	if err := s.client.Logout().Wait(); err != nil {
		return fmt.Errorf("LOGOUT: %w", err)
	}
	return nil
}

func (s *imapSession) close() {
	s.stop()
	_ = s.client.Close() // all that was wanted has been read
}

// scope is what is compared.
type scope struct {
	specialUse, acl, quota, sieve bool
	// modSeq: HIGHESTMODSEQ stands for all flags. It does where replication
	// carries it over as it is: between two Cyrus, not with dsync.
	modSeq bool
}

// scopeOf is what both members can be asked for.
func scopeOf(s [2]*imapSession) scope {
	both := func(c imap.Cap) bool { return s[0].caps.Has(c) && s[1].caps.Has(c) }
	return scope{
		specialUse: both(imap.CapSpecialUse),
		acl:        both(imap.CapACL),
		quota:      both(imap.CapQuota),
		sieve:      s[0].sieve != "" && s[1].sieve != "",
		modSeq:     both(imap.CapCondStore) && s[0].cyrus && s[1].cyrus,
	}
}

// skipped names what is left out. That special uses are is not worth a word:
// clients find the same mailboxes without.
func (sc scope) skipped() (what []string) {
	for name, in := range map[string]bool{"ACLs": sc.acl, "quota": sc.quota, "sieve scripts": sc.sieve} {
		if !in {
			what = append(what, name)
		}
	}
	return what
}

// holdings reads all but the flags.
func (s *imapSession) holdings(sc scope) (holdings, error) {
	h := holdings{}
	names, err := s.mailboxes(sc, h)
	if err != nil {
		return nil, err
	}
	for some := range slices.Chunk(names, window) {
		s.meter.refill()
		if err := s.ask(some, sc, h); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// mailboxes adds the user's own mailboxes and all subscriptions, and returns
// the names of those that can be selected.
func (s *imapSession) mailboxes(sc scope, h holdings) ([]string, error) {
	foreign, err := s.foreign()
	if err != nil {
		return nil, err
	}
	var options *imap.ListOptions
	if sc.specialUse {
		options = &imap.ListOptions{ReturnSpecialUse: true}
	}
	var names []string
	err = s.list(options, func(m *imap.ListData) {
		if foreign(m.Mailbox) {
			return
		}
		words := []string{"exists"}
		for _, attr := range m.Attrs {
			switch attr {
			case imap.MailboxAttrHasChildren, imap.MailboxAttrHasNoChildren, imap.MailboxAttrMarked, imap.MailboxAttrUnmarked,
				imap.MailboxAttrSubscribed, imap.MailboxAttrNoInferiors:
			default:
				words = append(words, strings.ToLower(string(attr)))
			}
		}
		slices.Sort(words[1:])
		h[item{m.Mailbox, whatMailbox}] = strings.Join(words, " ")
		if !slices.Contains(m.Attrs, imap.MailboxAttrNoSelect) && !slices.Contains(m.Attrs, imap.MailboxAttrNonExistent) {
			names = append(names, m.Mailbox)
		}
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	// As imapclient has no LSUB: the same by RFC 5258.
	return names, s.list(&imap.ListOptions{SelectSubscribed: true}, func(m *imap.ListData) {
		if slices.Contains(m.Attrs, imap.MailboxAttrSubscribed) {
			h[item{m.Mailbox, whatSubscription}] = "subscribed"
		}
	})
}

// list runs one LIST over everything.
func (s *imapSession) list(options *imap.ListOptions, each func(*imap.ListData)) error {
	s.meter.refill()
	cmd := s.client.List("", "*", options)
	n := 0
	for m := cmd.Next(); m != nil; m = cmd.Next() {
		if n++; n <= maxMailboxes {
			each(m)
		}
	}
	if err := cmd.Close(); err != nil {
		return fmt.Errorf("LIST: %w", err)
	}
	if n > maxMailboxes {
		return fmt.Errorf("LIST: more than %d mailboxes", maxMailboxes)
	}
	return nil
}

// foreign returns what says whether a mailbox lies in a namespace of others
// (RFC 2342).
func (s *imapSession) foreign() (func(mailbox string) bool, error) {
	if !s.caps.Has(imap.CapNamespace) && !s.caps.Has(imap.CapIMAP4rev2) {
		return func(string) bool { return false }, nil
	}
	ns, err := s.client.Namespace().Wait()
	if err != nil {
		return nil, fmt.Errorf("NAMESPACE: %w", err)
	}
	within := func(mailbox string, spaces []imap.NamespaceDescriptor) (longest int) {
		longest = -1
		for _, n := range spaces {
			root := n.Prefix
			if n.Delim != 0 {
				root = strings.TrimSuffix(root, string(n.Delim))
			}
			if strings.HasPrefix(mailbox, n.Prefix) || mailbox == root {
				longest = max(longest, len(n.Prefix))
			}
		}
		return longest
	}
	return func(mailbox string) bool {
		others := max(within(mailbox, ns.Other), within(mailbox, ns.Shared))
		return mailbox != "INBOX" && others > within(mailbox, ns.Personal)
	}, nil
}

// ask adds what a member has to say about mailboxes, with all questions sent
// before the first answer is awaited.
func (s *imapSession) ask(names []string, sc scope, h holdings) error {
	type questions struct {
		status *imapclient.StatusCommand
		acl    *imapclient.GetACLCommand
		quota  *imapclient.GetQuotaRootCommand
	}
	asked := make([]questions, len(names))
	for i, name := range names {
		asked[i].status = s.client.Status(name, &imap.StatusOptions{NumMessages: true, UIDNext: true, UIDValidity: true, HighestModSeq: sc.modSeq})
		if sc.acl {
			asked[i].acl = s.client.GetACL(name)
		}
		if sc.quota {
			asked[i].quota = s.client.GetQuotaRoot(name)
		}
	}
	for i, name := range names {
		status, err := asked[i].status.Wait()
		if err != nil {
			return fmt.Errorf("STATUS %q: %w", name, err)
		}
		if status.NumMessages == nil || sc.modSeq && status.HighestModSeq == 0 {
			return fmt.Errorf("STATUS %q: the answer lacks what was asked for", name)
		}
		words := fmt.Sprintf("%d messages, UIDNEXT %d, UIDVALIDITY %d", *status.NumMessages, status.UIDNext, status.UIDValidity)
		if sc.modSeq {
			words += fmt.Sprintf(", HIGHESTMODSEQ %d", status.HighestModSeq)
		}
		h[item{name, whatStatus}] = words
		if sc.acl {
			acl, err := asked[i].acl.Wait()
			if h[item{name, whatACL}], err = orRefusal(aclWords(acl), err); err != nil {
				return fmt.Errorf("GETACL %q: %w", name, err)
			}
		}
		if sc.quota {
			quota, err := asked[i].quota.Wait()
			if h[item{name, whatQuota}], err = orRefusal(rootWords(quota, h), err); err != nil {
				return fmt.Errorf("GETQUOTAROOT %q: %w", name, err)
			}
		}
	}
	return nil
}

// orRefusal takes a NO for an answer: a user need not have the right to ask
// for the ACL of a mailbox of their own, and then has it on neither member.
func orRefusal(words string, err error) (string, error) {
	var no *imap.Error
	if errors.As(err, &no) && no.Type == imap.StatusResponseTypeNo && no.Code != imap.ResponseCodeUnavailable {
		return "refused: " + no.Text, nil
	}
	return words, err
}

func aclWords(acl *imapclient.GetACLData) string {
	var words []string
	for _, who := range slices.Sorted(maps.Keys(acl.Rights)) {
		rights := slices.Sorted(slices.Values(acl.Rights[who]))
		words = append(words, fmt.Sprintf("%q %s", who, imap.RightSet(rights)))
	}
	return strings.Join(words, ", ")
}

// rootWords names a mailbox's quota roots, and adds each one's limits. Usage is
// not compared: a server may reckon it anew.
func rootWords(roots []imapclient.QuotaData, h holdings) string {
	var names []string
	for _, root := range roots {
		var limits []string
		for _, resource := range slices.Sorted(maps.Keys(root.Resources)) {
			limits = append(limits, fmt.Sprintf("%s %d", resource, root.Resources[resource].Limit))
		}
		name := fmt.Sprintf("quota root %q", root.Root)
		h[item{"", whatLimits + name}] = cmp.Or(strings.Join(limits, ", "), "none")
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/posthouse/posthouse/proxy/splice"
)

// Session is one connection in the session list, from Accept to Close: what a
// session keeps while it is spliced.
type Session struct {
	ID       string
	Protocol string
	Client   string // address and port
	Since    time.Time
	action   atomic.Pointer[string]

	mu      sync.Mutex
	User    string
	Role    string
	Backend string
	Epoch   uint64
	joined  *splice.Splice
	ending  splice.Cause // asked for before it was spliced
	ip      netip.Addr
}

// SessionInfo is a Session as `posthouse sessions` shows it.
type SessionInfo struct {
	ID       string    `json:"id"`
	Protocol string    `json:"protocol"`
	Client   string    `json:"client"`
	User     string    `json:"user,omitempty"`
	Role     string    `json:"role,omitempty"`
	Backend  string    `json:"backend,omitempty"`
	Epoch    uint64    `json:"epoch,omitempty"`
	Since    time.Time `json:"since"`
	// Action says what the session is doing, in words.
	Action string `json:"action"`
	// Up and Down are octets client → backend and back, since the login.
	Up   int64 `json:"octets_up"`
	Down int64 `json:"octets_down"`
}

func (l *Session) set(change func(*Session)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(l)
}

func (l *Session) user() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.User
}

func (l *Session) setAction(action string) { l.action.Store(&action) }

// Action says what the session is doing.
func (l *Session) Action() string {
	if a := l.action.Load(); a != nil {
		return *a
	}
	return "accepted"
}

// spliced records the running splice, or ends it if that was asked meanwhile.
func (l *Session) spliced(s *splice.Splice) {
	l.mu.Lock()
	l.joined = s
	why := l.ending
	l.mu.Unlock()
	if why != "" {
		s.End(why)
	}
}

func (l *Session) end(why splice.Cause) {
	l.mu.Lock()
	l.ending = why
	s := l.joined
	l.mu.Unlock()
	if s != nil {
		s.End(why)
	}
}

func (l *Session) info() SessionInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := SessionInfo{
		ID: l.ID, Protocol: l.Protocol, Client: l.Client, User: l.User, Role: l.Role, Backend: l.Backend,
		Epoch: l.Epoch, Since: l.Since, Action: l.Action(),
	}
	if l.joined != nil {
		i.Up, i.Down = l.joined.Octets()
	}
	return i
}

// sessions is the list of all connections, with its limits.
type sessions struct {
	most, mostPerIP int

	mu    sync.Mutex
	all   map[*Session]struct{}
	perIP map[netip.Addr]int // by network, see network
	gone  chan struct{}      // closed and renewed when one is removed
}

func newSessions(most, mostPerIP int) *sessions {
	return &sessions{
		most: most, mostPerIP: mostPerIP,
		all: make(map[*Session]struct{}), perIP: make(map[netip.Addr]int), gone: make(chan struct{}),
	}
}

// network is what max_connections_per_ip counts: an IPv4 address, or the /64
// that one IPv6 host can use as it likes.
func network(ip netip.Addr) netip.Addr {
	if ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return ip
}

// add lists a connection, or says which limit refuses it.
func (s *sessions) add(l *Session, ip netip.Addr) error {
	ip = network(ip)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.most > 0 && len(s.all) >= s.most {
		return fmt.Errorf("limits.max_connections: %d connections are open", len(s.all))
	}
	if s.mostPerIP > 0 && ip.IsValid() && s.perIP[ip] >= s.mostPerIP { // a unix socket has none
		return fmt.Errorf("limits.max_connections_per_ip: %s has %d connections", ip, s.perIP[ip])
	}
	l.ip = ip
	s.all[l] = struct{}{}
	s.perIP[ip]++
	return nil
}

// remove takes a connection off the list; one that is not on it is ignored.
func (s *sessions) remove(l *Session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, listed := s.all[l]; !listed {
		return
	}
	delete(s.all, l)
	if s.perIP[l.ip]--; s.perIP[l.ip] == 0 {
		delete(s.perIP, l.ip)
	}
	close(s.gone)
	s.gone = make(chan struct{})
}

func (s *sessions) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

func (s *sessions) snapshot() []*Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Session, 0, len(s.all))
	for l := range s.all {
		all = append(all, l)
	}
	return all
}

func (s *sessions) list() []SessionInfo {
	all := s.snapshot()
	infos := make([]SessionInfo, 0, len(all))
	for _, l := range all {
		infos = append(infos, l.info())
	}
	slices.SortFunc(infos, func(a, b SessionInfo) int { return a.Since.Compare(b.Since) })
	return infos
}

func (s *sessions) endAll(why splice.Cause) {
	for _, l := range s.snapshot() {
		l.end(why)
	}
}

// wait returns when the list is empty or ctx has ended.
func (s *sessions) wait(ctx context.Context) {
	for {
		s.mu.Lock()
		n, gone := len(s.all), s.gone
		s.mu.Unlock()
		if n == 0 {
			return
		}
		select {
		case <-gone:
		case <-ctx.Done():
			return
		}
	}
}

func (s *sessions) check() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	perIP := 0
	for ip, n := range s.perIP {
		if n <= 0 {
			return fmt.Errorf("session list: %s counts %d", ip, n)
		}
		perIP += n
	}
	if perIP != len(s.all) {
		return fmt.Errorf("session list: %d sessions, %d counted by address", len(s.all), perIP)
	}
	return nil
}

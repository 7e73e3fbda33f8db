package integration

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// lmtp is the MTA's way in to posthouse.
func (p *posthouse) lmtp() string { return p.host + ":24" }

// takesMail gives a site's frontends a listener for MTAs on loopback, which
// they trust. options are further keys of the lmtp section, YAML.
func takesMail(s *site, options ...string) *site {
	// A replica takes no mail: the preflight needs to know that a hook opens its
	// LMTP service.
	s.hooks = ", scope: role, hooks: {promote: [/bin/true]}"
	s.doors = append(s.doors, `{protocol: lmtp, address: "$HOST:24", tls: off, trusted: ["127.0.0.0/8"]}`)
	s.more = append(s.more, "lmtp: {"+strings.Join(append([]string{`local_domains: ["*"]`}, options...), ", ")+"}")
	return s
}

// addRole gives the site another role, with one member and users of its own.
func (s *site) addRole(name, member string, b backend, users ...string) {
	if s.roles == nil {
		s.roles = map[string]string{}
	}
	s.roles[name] = fmt.Sprintf("{members: [%s], active: %s}", member, member)
	s.backends[member] = b
	for _, user := range users {
		s.users[user] = name
	}
}

// lmtpds are the processes that take mail on this instance.
func (c *cyrus) lmtpds() []int {
	var pids []int
	for _, p := range c.family() {
		if strings.Contains(p.command, "lmtpd ") {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// readBy is how many octets a process has read so far, from files and
// connections.
func readBy(pid int) int64 {
	raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	for line := range strings.Lines(string(raw)) {
		if n, found := strings.CutPrefix(line, "rchar: "); found {
			read, _ := strconv.ParseInt(strings.TrimSpace(n), 10, 64)
			return read
		}
	}
	return 0
}

// freezeAll stops every process of the daemon: connections to it are still
// accepted, by the kernel, and nothing else happens.
func (d *daemon) freezeAll(t testing.TB) (thaw func()) {
	t.Helper()
	var pids []int
	for _, p := range d.family() {
		if syscall.Kill(p.pid, syscall.SIGSTOP) == nil {
			pids = append(pids, p.pid)
		}
	}
	thaw = func() {
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGCONT)
		}
	}
	t.Cleanup(thaw)
	return thaw
}

// freezeMidway waits until one lmtpd has read more than low octets of what is
// being delivered, and stops the instance. read is how many it had read then;
// 0 says that nothing was read within limit.
func (c *cyrus) freezeMidway(t testing.TB, low int64, limit time.Duration) (thaw func(), read int64) {
	t.Helper()
	before, pids := map[int]int64{}, c.lmtpds()
	for _, pid := range pids {
		before[pid] = readBy(pid)
	}
	deadline := time.Now().Add(limit)
	for look := 0; time.Now().Before(deadline); look++ {
		if look%50 == 49 {
			pids = c.lmtpds() // there may be a new one
		}
		for _, pid := range pids {
			if readBy(pid)-before[pid] > low {
				syscall.Kill(pid, syscall.SIGSTOP) // first, since there is no time to lose
				return c.freezeAll(t), readBy(pid) - before[pid]
			}
		}
	}
	return func() {}, 0
}

// lines is a body of about size octets, in lines of 78.
func lines(what string, size int) string {
	line := what + strings.Repeat(".", 76-len(what)) + "\r\n"
	return strings.Repeat(line, size/len(line))
}

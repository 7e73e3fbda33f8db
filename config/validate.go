package config

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// validation is one pass over a decoded file. It reports all faults, completes
// paths, and stops at none.
type validation struct {
	*document
	cfg *Config
	dir string // where relative paths start; absolute
}

func (v *validation) run() {
	v.general()
	v.listeners()
	v.certificates()
	v.auth()
	v.directory()
	v.usernames()
	v.backends()
	v.roles()
	v.store()
	v.admin()
	v.limits()
	v.lmtp()
	v.hold()
	v.positive("fanout", v.cfg.Fanout)
	v.greeting()
}

// oneOf reports a value that is none of known.
func (v *validation) oneOf(path, value string, known ...string) {
	switch {
	case slices.Contains(known, value):
	case value == "":
		v.faultAt(path, "is missing", "set it to "+or(known))
	default:
		v.faultAt(path, quote(value)+" is unknown", "use "+or(known))
	}
}

// or lists words as in "a, b or c".
func or(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

// absolute completes a path of the file. An empty one stays.
func (v *validation) absolute(path *string) {
	if *path != "" && !filepath.IsAbs(*path) {
		*path = filepath.Join(v.dir, *path)
	}
}

// readable reports whether the file can be opened, and says so if not.
func (v *validation) readable(path, name string) bool {
	if name == "" {
		v.faultAt(path, "is missing", "name the file")
		return false
	}
	f, err := os.Open(name)
	if err != nil {
		v.faultAt(path, fmt.Sprintf("%s cannot be read: %s", name, reason(err)), "correct the path, or let this user read it")
		return false
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.IsDir() {
		v.faultAt(path, name+" is not a file", "name a file")
		return false
	}
	return true
}

var (
	nameShape       = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	hostnameShape   = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?$`)
	capabilityShape = regexp.MustCompile(`^[A-Za-z0-9.;:=_/-]{1,128}$`)
)

// name reports a backend's or role's name that could not stand in a path, a
// metric, a map file or a command line.
func (v *validation) name(path, name string) {
	if !nameShape.MatchString(name) {
		v.faultAt(path, "unusable name", "use at most 64 letters, digits, dots, hyphens and underscores, a letter or digit first")
	}
}

func (v *validation) general() {
	if v.cfg.Hostname == "" {
		v.cfg.Hostname, _ = os.Hostname()
	}
	if !hostnameShape.MatchString(v.cfg.Hostname) {
		v.faultAt("hostname", quote(v.cfg.Hostname)+" is not a host name", "set it to the name that clients connect to")
	}
	if v.cfg.StateDir == "" {
		v.faultAt("state_dir", "is missing", "name a directory on a local file system")
	}
	v.absolute(&v.cfg.StateDir)
	if info, err := os.Stat(v.cfg.StateDir); err == nil && !info.IsDir() {
		v.faultAt("state_dir", v.cfg.StateDir+" is not a directory", "name a directory on a local file system")
	}
	v.oneOf("log.level", v.cfg.Log.Level, "debug", "info", "warn", "error")
	v.oneOf("log.format", v.cfg.Log.Format, "json", "console")
}

// hostPort splits an address and reports what is not host:port. Service names
// are not taken: which port they mean is another file's business.
func (v *validation) hostPort(path, address string) (host string, port uint16, ok bool) {
	const fix = "write host:port with a number, such as 127.0.0.1:143 or [::1]:143"
	if address == "" {
		v.faultAt(path, "is missing", fix)
		return "", 0, false
	}
	host, number, err := net.SplitHostPort(address)
	n, portErr := strconv.ParseUint(number, 10, 16)
	if err != nil || portErr != nil {
		v.faultAt(path, quote(address)+" is not an address", fix)
		return "", 0, false
	}
	if _, err := netip.ParseAddr(host); host != "" && err != nil && !hostnameShape.MatchString(host) {
		v.faultAt(path, quote(host)+" is neither a host name nor an IP address", fix)
		return "", 0, false
	}
	return host, uint16(n), true
}

// socket is an address that this process will listen on.
type socket struct {
	path, host string
	port       uint16
}

// clash reports whether the kernel would refuse the second of two sockets.
func (a socket) clash(b socket) bool {
	if a.port != b.port || a.port == 0 {
		return false
	}
	wild := func(s, other socket) bool {
		ip, err := netip.ParseAddr(other.host)
		return s.host == "" || s.host == "::" || s.host == "0.0.0.0" && (err != nil || ip.Is4() || ip.IsUnspecified())
	}
	return strings.EqualFold(a.host, b.host) || wild(a, b) || wild(b, a)
}

func (v *validation) listeners() {
	if len(v.cfg.Listeners) == 0 {
		v.faultAt("listeners", "none", "add {protocol: imap, address: \":993\", tls: implicit} or the like")
	}
	var sockets []socket
	add := func(path, address string) {
		host, port, ok := v.hostPort(path, address)
		if !ok {
			return
		}
		added := socket{path, host, port}
		for _, other := range sockets {
			if other.clash(added) {
				v.faultAt(path, fmt.Sprintf("%s is taken by %s", address, other.path), "choose another address or port")
				return
			}
		}
		sockets = append(sockets, added)
	}
	for i := range v.cfg.Listeners {
		path, l := fmt.Sprintf("listeners[%d]", i), &v.cfg.Listeners[i]
		v.oneOf(path+".protocol", l.Protocol, ProtocolIMAP, ProtocolPOP3, ProtocolSieve, ProtocolLMTP)
		if l.Protocol == ProtocolLMTP {
			v.lmtpListener(path, l)
		} else {
			v.oneOf(path+".tls", l.TLS, TLSStartTLS, TLSImplicit)
			v.lmtpOnly(path, *l)
		}
		if l.isUnix() {
			v.unixAddress(i)
		} else {
			add(path+".address", l.Address)
		}
	}
	if v.cfg.Admin.HTTP != "" {
		add("admin.http", v.cfg.Admin.HTTP)
	}
}

func (v *validation) usernames() {
	const separators = `%*+!/\` // auth.Separators; config imports nothing of ours
	for _, r := range v.cfg.Usernames.Allow {
		if !strings.ContainsRune(separators, r) {
			v.faultAt("usernames.allow", quote(string(r))+" is not a separator", "list only some of "+separators)
		}
	}
}

func (v *validation) roles() {
	if len(v.cfg.Roles) == 0 {
		v.faultAt("roles", "none", "add `name: {members: [a, b], active: a}`")
	}
	for _, name := range v.roleNames() {
		v.role(join("roles", name), name, v.cfg.Roles[name])
	}
	v.sharedBackends()
}

// roleNames returns the names in a fixed order.
func (v *validation) roleNames() []string { return slices.Sorted(maps.Keys(v.cfg.Roles)) }

func (v *validation) role(path, name string, r Role) {
	v.name(path, name)
	if len(r.Members) == 0 {
		v.faultAt(path+".members", "none", "list the backends that hold a copy")
	}
	for i, member := range r.Members {
		at := fmt.Sprintf("%s.members[%d]", path, i)
		if _, ok := v.cfg.Backends[member]; !ok {
			v.faultAt(at, fmt.Sprintf("there is no backend %s", quote(member)), "define it in backends, or correct the name")
		}
		if slices.Contains(r.Members[:i], member) {
			v.faultAt(at, quote(member)+" is listed twice", "delete one of them")
		}
	}
	v.hooks(path, r)
	v.catchUp(path+".catch_up", &r)
	v.cfg.Roles[name] = r
	switch {
	case r.Active == "":
		v.faultAt(path+".active", "is missing", "name the member that serves the role at first")
	case len(r.Members) > 0 && !slices.Contains(r.Members, r.Active):
		v.faultAt(path+".active", quote(r.Active)+" is not one of its members", "name one of them: "+strings.Join(r.Members, ", "))
	}
}

// maxSocketPath is the longest path of a unix socket: sun_path is 108 octets
// with its NUL (unix(7)).
const maxSocketPath = 107

func (v *validation) admin() {
	v.absolute(&v.cfg.Admin.Socket)
	switch {
	case v.cfg.Admin.Socket == "":
		v.faultAt("admin.socket", "is missing", "name a path, such as /run/posthouse/admin.sock")
	case len(v.cfg.Admin.Socket) > maxSocketPath:
		v.faultAt("admin.socket", fmt.Sprintf("longer than %d octets", maxSocketPath), "choose a shorter path")
	}
	for i, l := range v.cfg.Listeners {
		if l.isUnix() && l.unixPath() == filepath.Clean(v.cfg.Admin.Socket) {
			v.faultAt("admin.socket", fmt.Sprintf("%s is taken by listeners[%d].address", v.cfg.Admin.Socket, i), "choose another path")
		}
	}
	if mode := v.cfg.Admin.SocketMode; mode&0o002 != 0 {
		v.faultAt("admin.socket_mode", mode.String()+" lets everybody switch roles", "use 0600, or 0660 for a group")
	}
}

func (v *validation) greeting() {
	for i, c := range v.cfg.Greeting.SieveCapabilities {
		if !capabilityShape.MatchString(c) {
			v.faultAt(fmt.Sprintf("greeting.sieve_capabilities[%d]", i), quote(c)+" is not a Sieve capability", "write one word per item, such as fileinto")
		}
	}
}

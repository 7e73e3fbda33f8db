package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
)

func (v *validation) certificates() {
	v.oneOf("tls.min_version", v.cfg.TLS.MinVersion, "1.2", "1.3")
	needed := len(v.cfg.Listeners) == 0 || slices.ContainsFunc(v.cfg.Listeners, func(l Listener) bool { return l.TLS != TLSOff })
	if len(v.cfg.TLS.Certificates) == 0 && needed {
		v.faultAt("tls.certificates", "none", "add {cert: fullchain.pem, key: privkey.pem}")
	}
	for i := range v.cfg.TLS.Certificates {
		c := &v.cfg.TLS.Certificates[i]
		path := fmt.Sprintf("tls.certificates[%d]", i)
		v.absolute(&c.Cert)
		v.absolute(&c.Key)
		certOK, keyOK := v.readable(path+".cert", c.Cert), v.readable(path+".key", c.Key)
		if !certOK || !keyOK {
			continue
		}
		if _, err := tls.LoadX509KeyPair(c.Cert, c.Key); err != nil {
			v.faultAt(path, "unusable pair: "+reason(err), "name a PEM chain, leaf first, and the leaf's private key")
		}
	}
}

func (v *validation) auth() {
	// An MTA shows no credentials.
	needed := len(v.cfg.Listeners) == 0 || slices.ContainsFunc(v.cfg.Listeners, func(l Listener) bool { return l.Protocol != ProtocolLMTP })
	if len(v.cfg.Auth) == 0 && needed {
		v.faultAt("auth", "none", "add {type: file, path: users.passwd} or {type: backend}")
	}
	for i := range v.cfg.Auth {
		a := &v.cfg.Auth[i]
		path := fmt.Sprintf("auth[%d]", i)
		v.oneOf(path+".type", a.Type, AuthFile, AuthBackend)
		v.absolute(&a.Path)
		switch a.Type {
		case AuthFile:
			v.readable(path+".path", a.Path)
			v.masters(path+".masters", a.Masters)
		case AuthBackend:
			v.authBackend(path, *a)
		}
	}
}

func (v *validation) masters(path string, masters []string) {
	for i, name := range masters {
		at := fmt.Sprintf("%s[%d]", path, i)
		switch {
		case name == "":
			v.faultAt(at, "is empty", "name a user of the file")
		case slices.Contains(masters[:i], name):
			v.faultAt(at, quote(name)+" is listed twice", "delete one of them")
		}
	}
}

// authBackend checks an entry that lets the backend judge: whoever is verified
// here already could not be told from who is not, and only replay shows the
// backend a password.
func (v *validation) authBackend(path string, a Auth) {
	if len(v.cfg.Auth) > 1 {
		v.faultAt(path, "type backend beside other entries", "keep it alone, or remove it")
	}
	v.useless(path+".path", a.Path, "has no effect with type backend", "remove it")
	if len(a.Masters) > 0 {
		v.faultAt(path+".masters", "has no effect with type backend", "remove it")
	}
	for _, name := range slices.Sorted(maps.Keys(v.cfg.Backends)) {
		if style := v.cfg.Backends[name].Login.Style; style == StyleAuthzid || style == StyleMasterUser {
			v.faultAt("backends."+name+".login.style", style+" would let everybody in, as auth type backend checks no password", "use replay")
		}
	}
}

func (v *validation) directory() {
	if len(v.cfg.Directory) == 0 {
		v.faultAt("directory", "none", "add {type: file, path: users.map}, which maps users to roles")
	}
	for i := range v.cfg.Directory {
		d := &v.cfg.Directory[i]
		path := fmt.Sprintf("directory[%d]", i)
		v.oneOf(path+".type", d.Type, "file")
		v.absolute(&d.Path)
		if d.Type == "file" {
			v.readable(path+".path", d.Path)
		}
	}
}

// services are the keys of a backend's addresses.
var services = []string{ProtocolIMAP, ProtocolPOP3, ProtocolSieve, ProtocolLMTP}

func (v *validation) backends() {
	if len(v.cfg.Backends) == 0 {
		v.faultAt("backends", "none", "add `name: {imap: \"host:143\", …}`")
	}
	owner := make(map[string]string) // address → path of whose it is
	for i, l := range v.cfg.Listeners {
		owner[l.Address] = fmt.Sprintf("listeners[%d]", i)
	}
	for _, name := range slices.Sorted(maps.Keys(v.cfg.Backends)) {
		path, b := "backends."+name, v.cfg.Backends[name]
		v.name(path, name)
		v.addresses(path, name, b, owner)
		v.oneOf(path+".done", b.Done, DoneLogout, DoneEOF)
		v.backendTLS(path+".tls", &b.TLS)
		v.login(path+".login", &b.Login)
		v.cfg.Backends[name] = b
	}
}

// addresses checks the services of one backend. Two names for one address
// would make a switch between them fence nothing.
func (v *validation) addresses(path, name string, b Backend, owner map[string]string) {
	for _, service := range services {
		address, at := b.Address(service), path+"."+service
		if address == "" {
			if lacks := v.lacks(name, service); lacks != "" {
				v.faultAt(at, lacks, "add its host:port, or remove the listener")
			}
			continue
		}
		v.address(at, address, b.TLSMode(service), b, owner)
	}
	if b.Replica.IMAP != "" {
		v.address(path+".replica.imap", b.Replica.IMAP, b.TLS.Mode, b, owner)
	}
	if b.Replica.Sieve != "" {
		v.address(path+".replica.sieve", b.Replica.Sieve, b.TLS.Mode, b, owner)
	}
	if b.Replica.IMAP == "" {
		v.useless(path+".replica.sieve", b.Replica.Sieve, "has no effect without replica.imap", "add that, or remove this")
	}
}

// address checks one address of a backend, for which TLS begins by mode.
func (v *validation) address(at, address, mode string, b Backend, owner map[string]string) {
	host, port, ok := v.hostPort(at, address)
	switch {
	case !ok:
		return
	case host == "" || port == 0:
		v.faultAt(at, quote(address)+" lacks a host or a port", "write host:port")
	case mode == TLSOff && !b.InsecurePlaintext && !isLoopback(host):
		v.faultAt(at, fmt.Sprintf("tls.mode is off and %s is not loopback: passwords and mail would cross the network in the clear", quote(host)),
			"use starttls or implicit, or set insecure_plaintext: true")
	}
	if other, taken := owner[address]; taken {
		v.faultAt(at, fmt.Sprintf("%s is %s already", address, other), "give each server one name, and each service its own port")
	}
	owner[address] = at
}

// lacks says why a backend needs an address for the service; empty if it does
// not. Deliveries go to members of roles only, and may leave others alone.
func (v *validation) lacks(backend, service string) string {
	if !v.listens(service) {
		return ""
	}
	if service != ProtocolLMTP {
		return "is missing, and there is a listener for " + service
	}
	for _, role := range v.roleNames() {
		if slices.Contains(v.cfg.Roles[role].Members, backend) {
			return fmt.Sprintf("is missing, but %s is a member of role %s, and there is a listener for lmtp", backend, role)
		}
	}
	return ""
}

// listens reports whether clients can reach the service.
func (v *validation) listens(service string) bool {
	return slices.ContainsFunc(v.cfg.Listeners, func(l Listener) bool { return l.Protocol == service })
}

// isLoopback does not ask the resolver: what it says can change.
func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.Unmap().IsLoopback()
}

// useless reports a value that nothing will read: whoever set it expects
// something else.
func (v *validation) useless(path, value, what, fix string) {
	if value != "" {
		v.faultAt(path, what, fix)
	}
}

func (v *validation) backendTLS(path string, t *BackendTLS) {
	v.oneOf(path+".mode", t.Mode, TLSOff, TLSStartTLS, TLSImplicit)
	if t.LMTPMode != "" {
		v.oneOf(path+".lmtp_mode", t.LMTPMode, TLSOff, TLSStartTLS, TLSImplicit)
	}
	v.absolute(&t.CA)
	if t.Mode == TLSOff && (t.LMTPMode == "" || t.LMTPMode == TLSOff) {
		const what, fix = "has no effect with mode off", "remove it, or use starttls or implicit"
		v.useless(path+".ca", t.CA, what, fix)
		v.useless(path+".server_name", t.ServerName, what, fix)
		if t.InsecureSkipVerify {
			v.faultAt(path+".insecure_skip_verify", what, fix)
		}
		return
	}
	if t.InsecureSkipVerify {
		const what, fix = "has no effect with insecure_skip_verify", "remove one of the two"
		v.useless(path+".ca", t.CA, what, fix)
		v.useless(path+".server_name", t.ServerName, what, fix)
		return
	}
	if t.ServerName != "" && !hostnameShape.MatchString(t.ServerName) {
		if _, err := netip.ParseAddr(t.ServerName); err != nil {
			v.faultAt(path+".server_name", quote(t.ServerName)+" is not a host name", "write the name in the backend's certificate, without a port")
		}
	}
	if t.CA != "" {
		v.authorities(path+".ca", t.CA)
	}
}

// authorities reports a file without CA certificates.
func (v *validation) authorities(path, name string) {
	if !v.readable(path, name) {
		return
	}
	pem, err := os.ReadFile(name)
	if err != nil || !x509.NewCertPool().AppendCertsFromPEM(pem) {
		v.faultAt(path, name+" holds no certificate", "name a PEM file of CA certificates")
	}
}

func (v *validation) login(path string, l *Login) {
	v.oneOf(path+".style", l.Style, StyleAuthzid, StyleMasterUser, StyleReplay)
	v.absolute(&l.PasswordFile)
	switch l.Style {
	case StyleReplay:
		const what, fix = "has no effect with style replay", "remove it, or set style to authzid or master-user"
		v.useless(path+".user", l.User, what, fix)
		v.useless(path+".password_file", l.PasswordFile, what, fix)
	case StyleAuthzid, StyleMasterUser:
		v.proxyUser(path, l)
	}
}

// proxyUser checks the account of our own that a style needs.
func (v *validation) proxyUser(path string, l *Login) {
	switch {
	case l.User == "":
		v.faultAt(path+".user", "is missing, and style "+l.Style+" needs it", "name the proxy's account at the backend")
	case strings.ContainsFunc(l.User, func(r rune) bool { return r <= ' ' || r == 0x7f }):
		v.faultAt(path+".user", "holds white space or a control character", "name the proxy's account at the backend")
	}
	if l.Style == StyleMasterUser && strings.Contains(v.cfg.Usernames.Allow, "*") {
		v.faultAt(path+".style", "master-user joins names with *, which usernames.allow lists", "remove * from usernames.allow, or use authzid")
	}
	if l.PasswordFile == "" {
		v.faultAt(path+".password_file", "is missing, and style "+l.Style+" needs it", "name a file that holds the password and that others cannot read")
		return
	}
	if _, err := ReadSecret(l.PasswordFile); err != nil {
		what := err.Error()
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			what = l.PasswordFile + " cannot be read: " + reason(err)
		}
		v.faultAt(path+".password_file", what, "put the password alone on one line of a file with mode 0600 or 0640")
	}
}

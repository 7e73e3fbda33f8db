package config

import (
	"crypto/tls"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Values of Store.Type.
const (
	StoreFile = "file"
	StoreEtcd = "etcd"
)

// Values of Config.Fencing.
const (
	FencingStable = "stable"
	FencingLeased = "leased"
)

// Store says where the role table lives.
type Store struct {
	// Type is file (default): one file in StateDir; one host, any number of
	// frontends on it. etcd: an etcd cluster, any number of hosts.
	Type string `yaml:"type"`
	// Endpoints of the etcd cluster, as URLs: http://host:port or https://…
	Endpoints []string `yaml:"endpoints"`
	// Prefix of all keys in etcd; each site its own. Default /posthouse.
	Prefix string `yaml:"prefix"`
	// TLS to etcd, for https endpoints.
	TLS StoreTLS `yaml:"tls"`
	// User in etcd, if it demands one, and the file of the password.
	User         string `yaml:"user"`
	PasswordFile string `yaml:"password_file"`
	// Lease is how long etcd waits for a silent frontend before it shows it as
	// such; at least 2s, the same everywhere. Default 10s. See Config.Fencing.
	Lease time.Duration `yaml:"lease"`
}

// StoreTLS is how frontends and etcd know each other.
type StoreTLS struct {
	// CA is a PEM file of who signs etcd's certificates. Default: the system's.
	CA string `yaml:"ca"`
	// Cert and Key are this frontend's, if etcd demands one.
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

func (v *validation) store() {
	s := &v.cfg.Store
	v.oneOf("store.type", s.Type, StoreFile, StoreEtcd)
	v.oneOf("fencing", v.cfg.Fencing, FencingStable, FencingLeased)
	for _, path := range []*string{&s.PasswordFile, &s.TLS.CA, &s.TLS.Cert, &s.TLS.Key} {
		v.absolute(path)
	}
	switch s.Type {
	case StoreEtcd:
		v.etcd(s)
	case StoreFile:
		v.fileOnly()
	}
	if v.cfg.Fencing == FencingLeased && s.Type == StoreEtcd {
		v.leased()
	}
}

func (v *validation) fileOnly() {
	s := v.cfg.Store
	const why, fix = "has no effect with type file", "remove it, or set store.type to etcd"
	if len(s.Endpoints) > 0 {
		v.faultAt("store.endpoints", why, fix)
	}
	for _, key := range []string{"store.prefix", "store.lease"} {
		if v.written(key) {
			v.faultAt(key, why, fix)
		}
	}
	for path, value := range map[string]string{"store.user": s.User, "store.password_file": s.PasswordFile,
		"store.tls.ca": s.TLS.CA, "store.tls.cert": s.TLS.Cert, "store.tls.key": s.TLS.Key} {
		v.useless(path, value, why, fix)
	}
	if v.cfg.Fencing == FencingLeased {
		v.faultAt("fencing", "leased needs leases, which store type file has not", "use stable: the end of a process on this host is certain")
	}
}

func (v *validation) etcd(s *Store) {
	if len(s.Endpoints) == 0 {
		v.faultAt("store.endpoints", "none", "name the members of the cluster, such as http://10.0.0.1:2379")
	}
	secure := 0
	for i, endpoint := range s.Endpoints {
		path := fmt.Sprintf("store.endpoints[%d]", i)
		u, err := url.Parse(endpoint)
		switch {
		case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Path != "" || u.User != nil || u.RawQuery != "":
			v.faultAt(path, quote(endpoint)+" is not the URL of an etcd member", "write http://host:port or https://host:port")
			continue
		case u.Scheme == "https":
			secure++
		}
		v.hostPort(path, u.Host)
		if slices.Contains(s.Endpoints[:i], endpoint) {
			v.faultAt(path, quote(endpoint)+" is listed twice", "delete one of them")
		}
	}
	if secure > 0 && secure < len(s.Endpoints) {
		v.faultAt("store.endpoints", "some are http and some https", "use the same for all")
	}
	if !strings.HasPrefix(s.Prefix, "/") || strings.Contains(s.Prefix, "//") {
		v.faultAt("store.prefix", quote(s.Prefix)+" is not a prefix", "write a path such as /posthouse")
	}
	if s.Lease < 2*time.Second {
		v.faultAt("store.lease", s.Lease.String()+" is too short: etcd grants no less than 2s", "raise it")
	}
	v.etcdTLS(s, secure > 0)
	switch {
	case s.User != "" && s.PasswordFile == "":
		v.faultAt("store.password_file", "is missing", "name the file with the password of store.user")
	case s.User == "" && s.PasswordFile != "":
		v.faultAt("store.password_file", "has no effect without store.user", "add store.user, or remove it")
	case s.User != "":
		if _, err := ReadSecret(s.PasswordFile); err != nil {
			v.faultAt("store.password_file", reason(err), "correct the path, or let this user read it")
		}
	}
}

func (v *validation) etcdTLS(s *Store, isSecure bool) {
	if !isSecure {
		for path, value := range map[string]string{"store.tls.ca": s.TLS.CA, "store.tls.cert": s.TLS.Cert, "store.tls.key": s.TLS.Key} {
			v.useless(path, value, "has no effect with http endpoints", "use https endpoints, or remove it")
		}
		return
	}
	if s.TLS.CA != "" {
		v.authorities("store.tls.ca", s.TLS.CA)
	}
	if s.TLS.Cert == "" && s.TLS.Key == "" {
		return
	}
	if v.readable("store.tls.cert", s.TLS.Cert) && v.readable("store.tls.key", s.TLS.Key) {
		if _, err := tls.LoadX509KeyPair(s.TLS.Cert, s.TLS.Key); err != nil {
			v.faultAt("store.tls", "unusable pair: "+reason(err), "name a PEM chain, leaf first, and the leaf's private key")
		}
	}
}

// leased checks what fencing by leases needs: a hook that ends what a frontend
// may still do that was stopped past its lease (safety 10), and time to drain.
func (v *validation) leased() {
	for _, name := range v.roleNames() {
		if len(v.cfg.Roles[name].Hooks.Demote) == 0 { // fence runs in a failover only
			v.faultAt(join("roles", name)+".hooks.demote", "fencing leased needs it: no check inside a frontend that was stopped helps when it runs again",
				"add a hook that stops the old active, or cuts that frontend off there; or use fencing stable")
		}
	}
	// It is renewed when a third has passed, and a quarter is margin.
	if drain := v.cfg.Limits.DrainTimeout; v.cfg.Store.Lease < 3*drain {
		v.faultAt("store.lease", fmt.Sprintf("%v is too short for fencing leased: sessions need drain_timeout (%v) to end before it", v.cfg.Store.Lease, drain),
			fmt.Sprintf("raise it to %v or more", 3*drain))
	}
}

package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/backendpool/catchup"
	"github.com/posthouse/posthouse/cmd/posthouse/internal/admin"
	"github.com/posthouse/posthouse/config"
	"github.com/posthouse/posthouse/proxy"
	"github.com/posthouse/posthouse/proxy/auth"
	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/directory"
	"github.com/posthouse/posthouse/routing/etcdstore"
	"github.com/posthouse/posthouse/routing/filestore"
	"github.com/posthouse/posthouse/routing/hookrun"
	"github.com/posthouse/posthouse/routing/statedir"
)

// askEvery: a backend may be upgraded under the same address.
const askEvery = time.Minute

// instance is one frontend, built from its configuration.
type instance struct {
	cfg      *config.Config
	log      *zap.Logger
	state    *statedir.Dir
	store    routing.Store
	table    *routing.Table
	server   *proxy.Server
	metrics  *metrics
	built    chan struct{} // closed when server is there
	pool     *backendpool.Pool
	registry *prometheus.Registry
	serving  atomic.Bool

	certificates certificates
	verifiers    []*auth.File
	directories  []*directory.File
	listeners    []proxy.Listener
}

// parts are what a configuration names and can be tried without touching the
// state directory or a socket: `check` stops here.
func parts(cfg *config.Config) (*instance, error) {
	i := &instance{cfg: cfg, built: make(chan struct{})}
	names := normalizer(cfg)
	var errs []error
	for _, a := range cfg.Auth {
		if a.Type != config.AuthFile {
			continue
		}
		f, err := auth.OpenFile(a.Path, auth.FileOptions{Names: names, Masters: a.Masters})
		errs = append(errs, err)
		i.verifiers = append(i.verifiers, f)
	}
	for _, d := range cfg.Directory {
		f, err := directory.NewFile(d.Path, names.Normalize)
		errs = append(errs, err)
		i.directories = append(i.directories, f)
	}
	errs = append(errs, i.certificates.load(cfg.TLS.Certificates))
	for _, l := range cfg.Listeners {
		p, err := newListener(l)
		errs = append(errs, err)
		i.listeners = append(i.listeners, p)
	}
	var err error
	i.pool, err = newPool(cfg)
	errs = append(errs, err)
	return i, errors.Join(errs...)
}

func normalizer(cfg *config.Config) auth.Normalizer {
	return auth.Normalizer{Lowercase: cfg.Usernames.Lowercase, Allow: cfg.Usernames.Allow}
}

// build makes everything that cfg names, registers the frontend and opens the
// listeners; nothing is accepted before run. onEvent may be nil. ctx bounds
// the building only.
func build(ctx context.Context, cfg *config.Config, log *zap.Logger, onEvent func(routing.Event)) (*instance, error) {
	i, err := parts(cfg)
	if err != nil {
		return nil, err
	}
	i.log = log
	i.certificates.warn(log)
	i.registry = prometheus.NewRegistry()
	i.metrics = newMetrics(i.registry)
	i.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// The listeners first: a port in use must not leave a registration behind.
	if err := i.listen(ctx); err != nil {
		i.closeListeners()
		return nil, err
	}
	if err := i.join(ctx, onEvent); err != nil {
		i.closeListeners()
		return nil, err
	}
	limits := cfg.Limits
	i.server = proxy.New(proxy.Options{
		Hostname: cfg.Hostname, Listeners: i.listeners, TLS: i.tlsConfig(),
		Verifier: i.verifier(), Table: i.table, Backends: i.pool, Sieve: cfg.Greeting.SieveCapabilities, AskEvery: askEvery,
		Logger: log, Metrics: proxy.NewMetrics(i.registry),
		Limits: proxy.Limits{
			PreauthTimeout: limits.PreauthTimeout, AuthTries: limits.AuthTries, BadCommands: limits.BadCommands,
			AuthFailureDelay: limits.AuthFailureDelay, ConnectTimeout: limits.ConnectTimeout,
			BackendLoginTimeout: limits.BackendLoginTimeout, IdleTimeout: limits.IdleTimeout,
			WriteTimeout: limits.WriteTimeout, DrainTimeout: limits.DrainTimeout, KeepAlive: limits.Keepalive,
			MaxConnections: limits.MaxConnections, MaxConnectionsPerIP: limits.MaxConnectionsPerIP,
		},
		LMTP: i.lmtpOptions(),
	})
	close(i.built)
	i.watchTable()
	return i, nil
}

// reach tries a backend for a switch. The table asks as soon as it has started,
// which is before the server is there.
func (i *instance) reach(ctx context.Context, backend string) error {
	select {
	case <-i.built:
		return i.server.Reach(ctx, backend)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lmtpOptions are those of the LMTP target.
func (i *instance) lmtpOptions() proxy.LMTPOptions {
	l := i.cfg.LMTP
	return proxy.LMTPOptions{
		MaxSize: int64(l.MaxSize), MaxRecipients: l.MaxRecipients, MaxHops: l.MaxHops, MaxLine: l.MaxLine,
		MaxConnections: l.MaxConnections, IdleTimeout: l.IdleTimeout, CommandTimeout: l.CommandTimeout, ReplyTimeout: l.ReplyTimeout,
		Hold: i.cfg.Hold.LMTP, MaxLag: i.cfg.Fanout.MaxLag, SpoolDir: i.cfg.StateDir, MaxSpool: int64(i.cfg.Fanout.MaxSpool),
		Delimiter: l.RecipientDelimiter, LocalDomains: l.LocalDomains, Postmaster: l.Postmaster, CatchAll: l.CatchAll,
		Names: normalizer(i.cfg),
	}
}

// join opens the store and registers this frontend in it.
func (i *instance) join(ctx context.Context, onEvent func(routing.Event)) (err error) {
	if i.state, err = statedir.Open(i.cfg.StateDir); err != nil {
		return err
	}
	if fs := i.state.Volatile(); fs != "" {
		i.log.Warn("state_dir does not survive a reboot: the role table would be seeded again from the configuration",
			zap.String("state_dir", i.cfg.StateDir), zap.String("file_system", fs))
	}
	if i.store, err = i.openStore(ctx); err != nil {
		_ = i.state.Close()
		return err
	}
	chain := make(directory.Chain, 0, len(i.directories))
	for _, d := range i.directories {
		chain = append(chain, d)
	}
	roles := make(map[string]routing.RoleConfig, len(i.cfg.Roles))
	for name, r := range i.cfg.Roles {
		roles[name] = roleConfig(r, i.cfg.Limits)
	}
	addresses := make(map[string]map[string]string, len(i.cfg.Backends))
	for _, name := range i.pool.Names() {
		b, _ := i.pool.Backend(name)
		addresses[name] = maps.Clone(b.Addresses) // of those that users get to, all frontends must agree
		delete(addresses[name], catchup.IMAPService)
		delete(addresses[name], catchup.SieveService)
	}
	limits := i.cfg.Limits
	i.table, err = routing.Start(ctx, routing.Options{
		ID: routing.NewID(i.cfg.Hostname), Store: i.store, Directory: chain, Local: i.state,
		HoldWindow: limits.HoldWindow, SwitchBudget: limits.SwitchBudget, UndoReserve: limits.UndoReserve, Hooks: &hooks{programs(i.cfg.Roles, i.cfg.StateDir, i.log), i.comparisons(chain)}, Reach: i.reach,
		ResidueMaxAge: limits.ResidueMaxAge,
		Parking: routing.Parking{Total: limits.MaxParked, Role: limits.MaxParkedPerRole, User: limits.MaxParkedPerUser,
			Address: limits.MaxParkedPerIP, Unverified: limits.MaxParkedUnverified, EntryRate: limits.EntryRate},
		DrainTimeout: limits.DrainTimeout, Backends: addresses, Roles: roles,
		Settings: map[string]string{
			"usernames.lowercase": strconv.FormatBool(i.cfg.Usernames.Lowercase),
			"usernames.allow":     i.cfg.Usernames.Allow,
			"fencing":             i.cfg.Fencing,
		},
		Logger: i.log, OnEvent: i.metrics.countSwitches(onEvent),
	})
	if err != nil {
		return errors.Join(err, i.store.Close(), i.state.Close())
	}
	return nil
}

// openStore opens where the role table lives.
func (i *instance) openStore(ctx context.Context) (routing.Store, error) {
	c := i.cfg.Store
	if c.Type == config.StoreFile {
		return filestore.Open(i.state, i.log)
	}
	secure, err := storeTLS(c)
	if err != nil {
		return nil, err
	}
	o := etcdstore.Options{Endpoints: c.Endpoints, Prefix: c.Prefix, TLS: secure, User: c.User, Dir: i.state,
		Lease: c.Lease, Leased: i.cfg.Fencing == config.FencingLeased, Logger: i.log}
	if c.PasswordFile != "" {
		if o.Password, err = config.ReadSecret(c.PasswordFile); err != nil {
			return nil, fmt.Errorf("store.password_file: %w", err)
		}
	}
	return etcdstore.Open(ctx, o)
}

// storeTLS is the configuration for https endpoints; nil for others.
func storeTLS(c config.Store) (*tls.Config, error) {
	if !strings.HasPrefix(c.Endpoints[0], "https:") {
		return nil, nil
	}
	secure := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.TLS.CA != "" {
		var err error
		if secure.RootCAs, err = authorities(c.TLS.CA); err != nil {
			return nil, fmt.Errorf("store.tls.ca: %w", err)
		}
	}
	if c.TLS.Cert != "" {
		pair, err := tls.LoadX509KeyPair(c.TLS.Cert, c.TLS.Key)
		if err != nil {
			return nil, fmt.Errorf("store.tls: %w", err)
		}
		secure.Certificates = []tls.Certificate{pair}
	}
	return secure, nil
}

func roleConfig(r config.Role, l config.Limits) routing.RoleConfig {
	c := routing.RoleConfig{Members: r.Members, Active: r.Active, Scope: routing.Scope(r.Scope)}
	for _, h := range routing.AllHooks {
		if len(r.Hooks.ByName()[string(h)]) > 0 {
			c.Hooks = append(c.Hooks, h)
		}
	}
	if r.CatchUp.Type != "" && !slices.Contains(c.Hooks, routing.HookCatchUp) {
		if len(c.Hooks) == 0 {
			c.Scope = routing.ScopeRole // a comparison touches nothing
		}
		c.Hooks = append(c.Hooks, routing.HookCatchUp)
	}
	what, _ := json.Marshal([]any{r.Hooks, c.Scope, r.CatchUp, l.HoldWindow, l.SwitchBudget, l.UndoReserve}) // strings and numbers
	c.Digest = fmt.Sprintf("%x", sha256.Sum256(what))[:16]
	return c
}

// programs are the hooks of all roles.
func programs(roles map[string]config.Role, dir string, log *zap.Logger) *hookrun.Runner {
	r := &hookrun.Runner{Dir: dir, Log: log, Roles: make(map[string]hookrun.Commands, len(roles))}
	for name, role := range roles {
		commands := make(hookrun.Commands)
		for hook, argv := range role.Hooks.ByName() {
			commands[routing.Hook(hook)] = argv
		}
		r.Roles[name] = commands
	}
	return r
}

// verifier is who judges credentials, in the order of the configuration.
func (i *instance) verifier() auth.Verifier {
	if len(i.verifiers) == 0 {
		return &auth.Backend{Names: normalizer(i.cfg)}
	}
	chain := make(auth.Chain, 0, len(i.verifiers))
	for _, f := range i.verifiers {
		chain = append(chain, f)
	}
	return chain
}

// newListener is what the proxy needs to know of a listener, but for its socket.
func newListener(l config.Listener) (proxy.Listener, error) {
	p := proxy.Listener{Protocol: l.Protocol, Implicit: l.TLS == config.TLSImplicit}
	if l.Protocol != config.ProtocolLMTP {
		return p, nil
	}
	p.LMTP = &proxy.LMTPListener{
		Trusted: l.TrustedPrefixes(), BareNewline: l.BareNewline,
		StartTLS: l.TLS == config.TLSStartTLS, NeedsTLS: !l.AllowsPlaintext(),
	}
	if l.ClientCA == "" {
		return p, nil
	}
	var err error
	p.LMTP.ClientCAs, err = authorities(l.ClientCA)
	return p, err
}

func (i *instance) listen(ctx context.Context) error {
	var errs []error
	for n, l := range i.cfg.Listeners {
		network, address := l.Network()
		ln, err := listen(ctx, network, address, os.FileMode(l.Mode))
		if err != nil {
			errs = append(errs, fmt.Errorf("listener %s %s: %w: is another server (or another posthouse) on it?", l.Protocol, l.Address, err))
			continue
		}
		i.listeners[n].Listener = ln
	}
	return errors.Join(errs...)
}

// listen opens a listener. A unix socket gets its mode before anybody can
// connect to it.
func listen(ctx context.Context, network, address string, mode os.FileMode) (net.Listener, error) {
	if network == "unix" {
		return admin.Listen(address, mode)
	}
	var lc net.ListenConfig
	return lc.Listen(ctx, network, address)
}

func (i *instance) closeListeners() {
	for _, l := range i.listeners {
		if l.Listener != nil {
			_ = l.Listener.Close()
		}
	}
}

func newPool(cfg *config.Config) (*backendpool.Pool, error) {
	var errs []error
	var list []*backendpool.Backend
	for name, c := range cfg.Backends {
		b := &backendpool.Backend{
			Name: name, Addresses: make(map[string]string), TLS: backendpool.TLSMode(c.TLS.Mode),
			LMTPTLS: backendpool.TLSMode(c.TLSMode(config.ProtocolLMTP)),
			Style:   backendpool.Style(c.Login.Style), User: c.Login.User, EOFProves: c.Done == config.DoneEOF,
		}
		for _, service := range []string{"imap", "pop3", "sieve", "lmtp"} {
			if address := c.Address(service); address != "" {
				b.Addresses[service] = address
			}
		}
		if c.Replica.IMAP != "" {
			b.Addresses[catchup.IMAPService] = c.Replica.IMAP
		}
		if c.Replica.Sieve != "" {
			b.Addresses[catchup.SieveService] = c.Replica.Sieve
		}
		if c.TLS.Mode != config.TLSOff || c.TLSMode(config.ProtocolLMTP) != config.TLSOff {
			t, err := backendTLS(c.TLS)
			errs = append(errs, err)
			b.TLSConfig = t
		}
		if c.Login.PasswordFile != "" {
			password, err := config.ReadSecret(c.Login.PasswordFile)
			errs = append(errs, err)
			b.SetPassword(password)
		}
		list = append(list, b)
	}
	return backendpool.New(list, backendpool.Limits{
		ConnectTimeout: cfg.Limits.ConnectTimeout, Logins: cfg.Limits.BackendLogins, KeepAlive: cfg.Limits.Keepalive,
	}), errors.Join(errs...)
}

func backendTLS(c config.BackendTLS) (*tls.Config, error) {
	t := &tls.Config{
		MinVersion: tls.VersionTLS12, CipherSuites: suites, ServerName: c.ServerName,
		InsecureSkipVerify: c.InsecureSkipVerify, //nolint:gosec // the operator spelled it out
		ClientSessionCache: tls.NewLRUClientSessionCache(0),
	}
	if c.CA == "" {
		return t, nil
	}
	var err error
	t.RootCAs, err = authorities(c.CA)
	return t, err
}

// authorities reads a PEM file of CA certificates.
func authorities(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", path)
	}
	return pool, nil
}

// suites are those of TLS 1.2: crypto/tls's defaults hold two with CBC.
var suites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

func (i *instance) tlsConfig() *tls.Config {
	least := uint16(tls.VersionTLS12)
	if i.cfg.TLS.MinVersion == "1.3" {
		least = tls.VersionTLS13
	}
	return &tls.Config{MinVersion: least, CipherSuites: suites, GetCertificate: i.certificates.choose}
}

// certificates are what clients meet, chosen by SNI; the first is the default.
type certificates struct {
	list atomic.Pointer[[]tls.Certificate]
}

// load reads all pairs, or changes nothing.
func (c *certificates) load(pairs []config.Certificate) error {
	var errs []error
	var list []tls.Certificate
	for _, p := range pairs {
		pair, err := tls.LoadX509KeyPair(p.Cert, p.Key)
		if err != nil {
			errs = append(errs, fmt.Errorf("certificate %s: %w", p.Cert, err))
			continue
		}
		list = append(list, pair)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.list.Store(&list)
	return nil
}

// warn names the certificates that have expired: they are served all the same,
// because one of several must not keep a frontend, or its new ones, away.
func (c *certificates) warn(log *zap.Logger) {
	for _, pair := range *c.list.Load() {
		if time.Now().After(pair.Leaf.NotAfter) {
			log.Error("a certificate has expired", zap.Strings("names", pair.Leaf.DNSNames), zap.Time("on", pair.Leaf.NotAfter))
		}
	}
}

func (c *certificates) choose(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	list := *c.list.Load()
	if len(list) == 0 {
		return nil, errors.New("tls.certificates is empty")
	}
	for n := range list {
		if hello.SupportsCertificate(&list[n]) == nil {
			return &list[n], nil
		}
	}
	return &list[0], nil
}

// newLogger logs to standard error. Nothing is sampled away: every login has
// its line.
func newLogger(c config.Log) (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(c.Level)
	if err != nil {
		return nil, err
	}
	z := zap.NewProductionConfig()
	z.Level = zap.NewAtomicLevelAt(level)
	z.Sampling = nil
	z.Encoding = strings.ToLower(c.Format)
	z.EncoderConfig.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	z.EncoderConfig.EncodeDuration = zapcore.SecondsDurationEncoder
	z.DisableStacktrace = true
	z.DisableCaller = true
	return z.Build()
}

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/posthouse/posthouse/cmd/posthouse/internal/admin"
	"github.com/posthouse/posthouse/config"
	"github.com/posthouse/posthouse/routing/directory"
)

// startTimeout bounds registering in the store.
const startTimeout = 30 * time.Second

func serveCommand() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use: "serve -c FILE", Short: "Serve clients until SIGTERM", Args: cobra.NoArgs,
		Long: "Serve clients until SIGTERM or SIGINT, which stop accepting and end every session in good order\n" +
			"within limits.shutdown_timeout. SIGHUP reads certificates, users, map and password files again.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(path)
			if err != nil {
				return err
			}
			log, err := newLogger(cfg.Log)
			if err != nil {
				return err
			}
			defer func() { _ = log.Sync() }()
			return serve(cmd.Context(), cfg, log)
		},
	}
	c.Flags().StringVarP(&path, "config", "c", "/etc/posthouse/posthouse.yaml", "configuration file")
	return c
}

func checkCommand() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use: "check -c FILE", Short: "Check a configuration and all files that it names", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(path)
			if err != nil {
				return err
			}
			if _, err := parts(cfg); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: ok, %d roles on %d backends\n", path, len(cfg.Roles), len(cfg.Backends))
			return err
		},
	}
	c.Flags().StringVarP(&path, "config", "c", "/etc/posthouse/posthouse.yaml", "configuration file")
	return c
}

// serve runs a frontend until ctx or a signal ends it.
func serve(ctx context.Context, cfg *config.Config, log *zap.Logger) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)

	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	i, err := build(starting, cfg, log, nil)
	if err != nil {
		return err
	}
	go func() {
		for {
			select {
			case <-hup:
				i.reload()
			case <-ctx.Done():
				return
			}
		}
	}()
	return i.run(ctx)
}

// run serves until ctx ends, then drains every session, says goodbye to the
// store and closes what build opened. The error says what did not end well.
func (i *instance) run(ctx context.Context) error {
	defer func() { _ = i.state.Close() }()
	defer func() { _ = i.store.Close() }()
	stopAdmin, err := i.serveAdmin(ctx)
	if err != nil {
		i.closeListeners()
		return errors.Join(err, i.table.Close(context.WithoutCancel(ctx)))
	}
	for _, l := range i.listeners {
		i.log.Info("listening", zap.String("protocol", l.Protocol), zap.Bool("implicit_tls", l.Implicit),
			zap.Stringer("address", l.Listener.Addr()))
	}
	i.serving.Store(true)
	i.server.Serve(ctx)
	i.serving.Store(false)

	i.log.Info("stopping", zap.Duration("shutdown_timeout", i.cfg.Limits.ShutdownTimeout))
	// The admin socket answers while sessions drain.
	draining, cancel := context.WithTimeout(context.WithoutCancel(ctx), i.cfg.Limits.ShutdownTimeout)
	defer cancel()
	if err := i.server.Shutdown(draining); err != nil {
		// They leave residues, which the goodbye hands to the store: nothing
		// is lost, and a switch will know.
		i.log.Warn("sessions did not end in time", zap.Error(err))
	}
	goodbye, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
	defer cancel()
	err = i.table.Close(goodbye)
	stopAdmin()
	if err != nil {
		i.log.Error("stopped without a goodbye", zap.Error(err))
		return err
	}
	i.log.Info("stopped")
	return nil
}

// serveAdmin serves the admin socket and admin.http. stop ends both.
func (i *instance) serveAdmin(ctx context.Context) (stop func(), err error) {
	socket, err := admin.Listen(i.cfg.Admin.Socket, os.FileMode(i.cfg.Admin.SocketMode))
	if err != nil {
		return nil, err
	}
	api := admin.NewServer(admin.NewHandler(admin.Source{
		Table: i.table, Sessions: i.server.Sessions, Version: version, Names: i.names,
	}))
	stops := []func(){serveHTTP(api, socket, i.log)}
	stop = func() {
		for _, s := range stops {
			s()
		}
	}
	if i.cfg.Admin.HTTP == "" {
		return stop, nil
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", i.cfg.Admin.HTTP)
	if err != nil {
		stop()
		return nil, fmt.Errorf("admin.http %s: %w", i.cfg.Admin.HTTP, err)
	}
	stops = append(stops, serveHTTP(admin.NewServer(admin.NewHealth(i.registry, i.ready)), l, i.log))
	return stop, nil
}

// names are those that a login, else a delivery, looks for in the directory.
func (i *instance) names(typed string) ([]string, error) {
	recipient := i.server.RecipientNames(typed)
	login, err := normalizer(i.cfg).Normalize(typed)
	switch {
	case err == nil:
		return append([]string{login}, recipient...), nil
	case len(recipient) > 0:
		return recipient, nil
	}
	return nil, err
}

// ready is what /readyz says: of this frontend only. A held role or a dead
// backend must not take all frontends out of the pool at once.
func (i *instance) ready() error {
	if !i.serving.Load() {
		return errors.New("not accepting connections")
	}
	return i.table.Ready()
}

func serveHTTP(s *http.Server, l net.Listener, log *zap.Logger) (stop func()) {
	go func() {
		if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			log.Error("the admin server ended", zap.Stringer("address", l.Addr()), zap.Error(err))
		}
	}()
	return func() { _ = s.Close() }
}

// reload reads certificates, users, map and password files again. A bad file
// changes nothing of what it holds.
func (i *instance) reload() {
	fail := func(what string, err error) {
		if err != nil {
			i.log.Error("reload refused, the old content stays", zap.String("what", what), zap.Error(err))
		}
	}
	fail("tls.certificates", i.certificates.load(i.cfg.TLS.Certificates))
	i.certificates.warn(i.log)
	for _, f := range i.verifiers {
		fail("auth", f.Reload())
	}
	fail("directory", directory.Reload(i.directories, i.state.Recall))
	for name, c := range i.cfg.Backends {
		if c.Login.PasswordFile == "" {
			continue
		}
		password, err := config.ReadSecret(c.Login.PasswordFile)
		fail("login of backend "+name, err)
		if b, ok := i.pool.Backend(name); ok && err == nil {
			b.SetPassword(password)
		}
	}
	i.log.Info("reloaded")
}

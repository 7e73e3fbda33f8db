package proxy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/posthouse/posthouse/backendpool"
	"github.com/posthouse/posthouse/routing"
)

// offersPatience bounds the first round, before the first client: a backend
// that is down must not keep a frontend from starting.
const offersPatience = 2 * time.Second

// offers knows what the backends announce before login. A client may be told
// no more than what every active backend has (G8), since nobody knows yet
// which of them it will get.
type offers struct {
	server *Server

	mu      sync.Mutex
	learned map[string]map[string][]string // protocol → backend → tokens
}

func newOffers(s *Server) *offers {
	return &offers{server: s, learned: make(map[string]map[string][]string)}
}

// learn records what a backend has announced.
func (o *offers) learn(protocol, backend string, announced []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.learned[protocol] == nil {
		o.learned[protocol] = make(map[string][]string)
	}
	o.learned[protocol][backend] = announced
}

// shared returns the tokens that all active backends announce, in the first
// one's order. A backend that was never met does not count: it serves nobody.
func (o *offers) shared(protocol string) []string {
	all := o.all(protocol)
	if len(all) == 0 {
		return nil
	}
	common := slices.Clone(all[0])
	for _, announced := range all[1:] {
		common = slices.DeleteFunc(common, func(token string) bool { return !has(announced, token) })
	}
	return common
}

// all returns what each active backend that was met announces.
func (o *offers) all(protocol string) [][]string {
	actives := o.server.options.Table.ActiveBackends()
	o.mu.Lock()
	defer o.mu.Unlock()
	var all [][]string
	for _, backend := range actives {
		if announced, met := o.learned[protocol][backend]; met {
			all = append(all, announced)
		}
	}
	return all
}

// start asks the actives once, for at most offersPatience, and goes on asking
// until ctx ends.
func (o *offers) start(ctx context.Context) {
	if o.server.options.AskEvery == 0 {
		return
	}
	once, cancel := context.WithTimeout(ctx, offersPatience)
	o.ask(once)
	cancel()
	o.server.running.Go(func() { o.keepAsking(ctx) })
}

func (o *offers) keepAsking(ctx context.Context) {
	for {
		// Which backends are active decides, not that the table has changed.
		known := o.server.options.Table.ActiveBackends()
		timer := time.NewTimer(o.server.options.AskEvery)
		for changed := false; !changed; {
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
				changed = true
			case <-o.server.options.Table.Changed():
				changed = !slices.Equal(known, o.server.options.Table.ActiveBackends())
			}
		}
		timer.Stop()
		o.ask(ctx)
	}
}

// ask meets every active backend on every protocol that is served, and never
// logs in.
func (o *offers) ask(ctx context.Context) {
	var asking sync.WaitGroup
	for _, name := range o.server.options.Table.ActiveBackends() {
		asking.Go(func() {
			if err := o.server.Reach(ctx, name); err != nil {
				o.server.log.Warn("could not ask a backend what it announces", zap.String("backend", name), zap.Error(err))
			}
		})
	}
	asking.Wait()
}

// Reach meets a backend on every protocol that is served, all at a time, never
// logs in, and returns who could not be met, and why; routing.ErrNobodyListens if
// all of these refuse connections. It takes at most the connect timeout, twice
// with TLS.
func (s *Server) Reach(ctx context.Context, name string) error {
	backend, ok := s.options.Backends.Backend(name)
	if !ok {
		return failf(Misconfigured, "find the backend", "backend %s is not in this frontend's configuration", name)
	}
	protocols := make(map[string]bool)
	for _, l := range s.options.Listeners {
		protocols[l.Protocol] = true
	}
	errs := make([]error, len(protocols))
	var asking sync.WaitGroup
	for n, protocol := range slices.Sorted(maps.Keys(protocols)) {
		asking.Go(func() {
			if err := s.ask(ctx, backend, protocol); err != nil {
				errs[n] = fmt.Errorf("%s: %w", protocol, err)
			}
		})
	}
	asking.Wait()
	err := errors.Join(errs...)
	if err != nil && !slices.ContainsFunc(errs, func(err error) bool { return err != nil && !errors.Is(err, syscall.ECONNREFUSED) }) {
		return fmt.Errorf("%w: %w", routing.ErrNobodyListens, err)
	}
	return err
}

// ask learns what a backend announces on one protocol.
func (s *Server) ask(ctx context.Context, backend *backendpool.Backend, protocol string) error {
	d := s.words(protocol)
	b, announced, err := s.meet(ctx, d, protocol, backend)
	if err != nil {
		return err
	}
	s.offers.learn(protocol, backend.Name, announced)
	b.deadline(time.Now().Add(answerTimeout))
	_ = b.writeLines(d.partingWords()) // politeness; the connection closes either way
	b.close()
	return nil
}

// Package etcdstore keeps the role table in etcd, for frontends on many hosts.
// Below a prefix there are
//
//	state/table         revision, and the hashes of the parts of the State
//	state/parts/HASH    one part: some roles, one frontend, … as JSON
//	used/ID             the frontend ID was joined once; never again
//	alive/ID            on the lease of the process that joined as ID
//	election/…          who drives switches, and who waits to
//
// A part is never changed: its key is the hash of its value. A change writes
// the parts that are new, and then the table in their place: one comparison of
// one key, whatever its size, where a key for each role would run into etcd's
// limits (128 operations and 1.5 MiB in a request) as soon as all roles change
// at once. And a table can only be read whole: a part that is missing or
// damaged, in a cache, in a watch or in etcd, is noticed.
//
// etcd keeps every revision until it is compacted: run it with
// --auto-compaction-retention.
package etcdstore

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

// Options of Open.
type Options struct {
	// Endpoints of the etcd cluster, host:port or URLs. At least one.
	Endpoints []string
	// Prefix of all keys; /posthouse if empty. One site has one prefix.
	Prefix string
	// TLS to etcd; nil for none. User and Password if etcd demands them.
	TLS            *tls.Config
	User, Password string
	// Dir proves the end of frontends on this machine. It must stay open
	// until Close.
	Dir *statedir.Dir
	// Lease is how long etcd waits for a silent frontend, and for a silent
	// driver; 10 s if zero, at least 2 s. All frontends should have the same.
	Lease time.Duration
	// Leased counts a frontend whose lease has run out as gone, wherever it
	// is: see Deadline. All frontends must agree.
	Leased bool
	// Logger; nil for none. Of the etcd client's own lines it gets the
	// warnings.
	Logger *zap.Logger
}

const (
	defaultPrefix = "/posthouse"
	defaultLease  = 10 * time.Second
	minLease      = 2 * time.Second // etcd itself grants no less

	// patience bounds a call whose caller has set no deadline.
	patience = 5 * time.Second
	// farewell bounds the revocation of a lease, which runs out by itself.
	farewell = time.Second
)

// ErrClosed: the store was closed.
var ErrClosed = errors.New("store is closed")

// Store is a routing.Store. Two of them behave alike whether they are in one
// process or on two machines.
type Store struct {
	opt  Options
	log  *zap.Logger
	mark string // this Store's own, in what it creates

	// closed ends when Close is called; stop ends it.
	closed context.Context
	stop   context.CancelFunc
	tasks  sync.WaitGroup
	gone   chan struct{} // closed when Close has done its work

	// dialing is held by who makes the client.
	dialing chan struct{}

	mu      sync.Mutex
	ended   bool
	client  *clientv3.Client // made at the first call
	know    knowledge
	strays  map[string]struct{} // parts that no table refers to, as far as seen
	offices map[clientv3.LeaseID]struct{}

	follow sync.Once
	live   liveness
}

var _ routing.Store = (*Store)(nil)

// Open returns a store. It does not talk to etcd, which may be away: the first
// call does.
func Open(ctx context.Context, opt Options) (*Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(opt.Endpoints) == 0 {
		return nil, errors.New("etcd: no endpoints")
	}
	if opt.Dir == nil {
		return nil, errors.New("etcd: no state directory")
	}
	if opt.Prefix == "" {
		opt.Prefix = defaultPrefix
	}
	opt.Prefix = strings.TrimRight(opt.Prefix, "/") + "/"
	if opt.Lease == 0 {
		opt.Lease = defaultLease
	}
	if opt.Lease < minLease {
		return nil, fmt.Errorf("etcd: a lease of %v is too short: at least %v", opt.Lease, minLease)
	}
	if opt.Logger == nil {
		opt.Logger = zap.NewNop()
	}
	s := &Store{opt: opt, log: opt.Logger, mark: rand.Text(), gone: make(chan struct{}), dialing: make(chan struct{}, 1),
		strays: map[string]struct{}{}, offices: map[clientv3.LeaseID]struct{}{}}
	s.know.changed = make(chan struct{})
	s.live = liveness{ids: map[string]*member{}, busy: make(chan struct{}, 1), lapsed: time.Now()}
	s.closed, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// Close ends the liveness of every ID that joined through s, its campaigns and
// its watches. It blocks for a second at most when etcd is away; what is in
// etcd then runs out with its leases.
func (s *Store) Close() error {
	s.mu.Lock()
	first := !s.ended
	s.ended = true
	client := s.client
	s.mu.Unlock()
	if !first {
		<-s.gone
		return nil
	}
	defer close(s.gone)
	s.stop()
	s.leave(client)
	if client != nil {
		_ = client.Close() // nothing is left to be lost
	}
	s.tasks.Wait()
	return nil
}

// leave gives up what is held, here and in etcd.
func (s *Store) leave(client *clientv3.Client) {
	s.live.busy <- struct{}{} // for good: no lease is renewed after this
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	s.mu.Lock()
	leases := []clientv3.LeaseID{s.live.lease}
	for id := range s.offices {
		leases = append(leases, id)
	}
	locks := s.live.ended
	for _, m := range s.live.ids {
		if m.lock != nil {
			locks = append(locks, m.lock)
		}
	}
	s.live.ids = nil
	s.mu.Unlock()
	var revoked sync.WaitGroup
	for _, id := range leases {
		if client != nil && id != clientv3.NoLease {
			revoked.Go(func() { _, _ = client.Revoke(ctx, id) })
		}
	}
	revoked.Wait()
	for _, l := range locks {
		l.Unlock()
	}
}

// spawn runs a task that Close waits for. It ends soon after s.closed, or when
// the client is closed.
func (s *Store) spawn(task func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return ErrClosed
	}
	s.tasks.Go(task)
	return nil
}

// until ends with ctx or with s.
func (s *Store) until(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.closed, func() { cancel(ErrClosed) })
	return ctx, func() { stop(); cancel(nil) }
}

// bounded ends with ctx or with s, and has a deadline.
func (s *Store) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := s.until(ctx)
	if _, has := ctx.Deadline(); has {
		return ctx, cancel
	}
	ctx, expire := context.WithTimeout(ctx, patience)
	return ctx, func() { expire(); cancel() }
}

func (s *Store) key(parts ...string) string { return s.opt.Prefix + strings.Join(parts, "/") }

// connected returns the client. With a user it authenticates first, which
// takes an etcd that answers; hence not in Open.
func (s *Store) connected(ctx context.Context) (*clientv3.Client, error) {
	select {
	case s.dialing <- struct{}{}:
		defer func() { <-s.dialing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	client, ended := s.client, s.ended
	s.mu.Unlock()
	if ended {
		return nil, ErrClosed
	}
	if client != nil {
		return client, nil
	}
	client, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		_ = client.Close()
		return nil, ErrClosed
	}
	s.client = client
	return client, nil
}

// dial is bounded by ctx, which the client does not keep.
func (s *Store) dial(ctx context.Context) (*clientv3.Client, error) {
	life, kill := context.WithCancel(context.Background())
	stop := context.AfterFunc(ctx, kill)
	level := max(zap.WarnLevel, zapcore.LevelOf(s.log.Core()))
	client, err := clientv3.New(clientv3.Config{
		Context:   life,
		Endpoints: s.opt.Endpoints,
		TLS:       s.opt.TLS,
		Username:  s.opt.User,
		Password:  s.opt.Password,
		// A member that has frozen is left after this and the time below; gRPC
		// pings no more often.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 2 * time.Second,
		// Trying again is for call, which knows how long.
		MaxUnaryRetries: 2,
		DialOptions:     []grpc.DialOption{grpc.WithChainUnaryInterceptor(failFast)},
		Logger:          s.log.Named("etcd").WithOptions(zap.IncreaseLevel(level)),
	})
	if err == nil && !stop() {
		_ = client.Close()
		err = ctx.Err()
	}
	if err != nil {
		kill()
	}
	return client, err
}

// authenticate is the method that gets a token for a user and a password.
const authenticate = "/etcdserverpb.Auth/Authenticate"

// failFast makes a request fail when no member can be connected to. The client
// would wait until its context ends, and then not say why. And it sends its old
// token when it asks for a new one: an etcd that was restarted refuses that, for
// which the client would ask for a new one, for ever. errStale ends that.
func failFast(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, conn, append(opts, grpc.WaitForReady(false))...)
	if method == authenticate && errors.Is(rpctypes.Error(err), rpctypes.ErrInvalidAuthToken) {
		return errStale
	}
	return err
}

// errStale: the client's token is none any more; there must be a new client.
var errStale = status.Error(codes.Aborted, "etcd has forgotten the token")

// drop closes a client that is of no use any more.
func (s *Store) drop(client *clientv3.Client) {
	s.mu.Lock()
	if s.client == client {
		s.client = nil
	}
	s.mu.Unlock()
	_ = client.Close()
}

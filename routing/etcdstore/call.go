package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A request to a member that has frozen gets no answer: it is repeated after
// firstTry, maybe at another member, and again after twice as long, up to
// longestTry.
const (
	firstTry   = time.Second
	longestTry = 8 * time.Second
)

// errUnanswered: no answer came that says what etcd did.
var errUnanswered = errors.New("no answer")

// call sends a request until it is answered or ctx ends. A request may have
// been carried out more than once then, or will be: do must be such that this
// does no harm. An error that is not errUnanswered is etcd's refusal.
func (s *Store) call(ctx context.Context, what string, do func(context.Context, *clientv3.Client) error) error {
	var last error
	for limit := firstTry; ; limit = min(2*limit, longestTry) {
		if ctx.Err() != nil {
			return s.unanswered(ctx, what, last)
		}
		err := s.once(ctx, limit, do)
		if err == nil {
			return nil
		}
		if isRefusal(err) {
			return fmt.Errorf("etcd at %s: %s: %w", s.endpoints(), what, err)
		}
		// "Connection refused" says more than that a try took too long.
		if last == nil || !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
			last = err
		}
		pause(ctx, limit/20)
	}
}

func (s *Store) unanswered(ctx context.Context, what string, last error) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, ErrClosed) || last == nil || errors.Is(last, cause) {
		return fmt.Errorf("etcd at %s: %s: %w: %w", s.endpoints(), what, errUnanswered, cause)
	}
	return fmt.Errorf("etcd at %s: %s: %w: %w (%w)", s.endpoints(), what, errUnanswered, last, cause)
}

func (s *Store) endpoints() string { return strings.Join(s.opt.Endpoints, ", ") }

func (s *Store) once(ctx context.Context, limit time.Duration, do func(context.Context, *clientv3.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	client, err := s.connected(ctx)
	if err != nil {
		return err
	}
	err = do(ctx, client)
	if status.Code(err) == status.Code(errStale) {
		s.drop(client)
	}
	return err
}

// isRefusal says whether etcd has answered, and another try gets the same
// answer. Everything else may have been carried out, or may yet be.
func isRefusal(err error) bool {
	if errors.Is(err, rpctypes.ErrTooManyRequests) {
		return false
	}
	code := status.Code(err)
	if e, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		code = e.Code()
	}
	switch code {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied,
		codes.ResourceExhausted, codes.FailedPrecondition, codes.OutOfRange, codes.Unimplemented:
		return true
	}
	return false
}

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

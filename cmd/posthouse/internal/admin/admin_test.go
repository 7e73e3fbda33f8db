package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/posthouse/posthouse/proxy"
	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/filestore"
	"github.com/posthouse/posthouse/routing/statedir"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// everybody is a directory in which every user is in role r.
type everybody struct{}

func (everybody) Lookup(_ context.Context, name string) (routing.Entry, error) {
	if name == "nobody" || strings.Contains(name, "+") {
		return routing.Entry{}, routing.ErrUnknownUser
	}
	return routing.Entry{User: name, Role: "r"}, nil
}

func lower(name string) (string, error) {
	if strings.Contains(name, "%") {
		return "", errors.New("a separator")
	}
	return strings.ToLower(name), nil
}

// frontend is a role table, and the API over a real socket.
type frontend struct {
	table  *routing.Table
	client *Client
	close  func()
}

// start opens a table in dir with one role, r, on a and b.
func start(t testing.TB, dir string, budget time.Duration) *frontend {
	t.Helper()
	return startWith(t, dir, budget, nil)
}

func startWith(t testing.TB, dir string, budget time.Duration, hooks routing.Hooks) *frontend {
	t.Helper()
	state, err := statedir.Open(dir)
	must(t, err)
	store, err := filestore.Open(state, nil)
	must(t, err)
	table, err := routing.Start(t.Context(), routing.Options{
		ID: routing.NewID("fe"), Store: store, Directory: everybody{}, Local: state, SwitchBudget: budget, Hooks: hooks,
		Backends: map[string]map[string]string{"a": {"imap": "192.0.2.1:143"}, "b": {"imap": "192.0.2.2:143"}},
		Roles:    map[string]routing.RoleConfig{"r": {Members: []string{"a", "b"}, Active: "a"}},
	})
	must(t, err)
	path := filepath.Join(shortDir(t), "s")
	l, err := Listen(path, 0o600)
	must(t, err)
	sessions := func() []proxy.SessionInfo { return []proxy.SessionInfo{{ID: "S1", User: "u"}} }
	s := NewServer(NewHandler(Source{Table: table, Sessions: sessions, Version: "9", Names: func(typed string) ([]string, error) {
		name, err := lower(typed)
		base, _, _ := strings.Cut(name, "+")
		return slices.Compact([]string{name, base}), err
	}}))
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	f := &frontend{table: table, client: NewClient(path)}
	f.close = func() {
		_ = s.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		for _, err := range []error{table.Check(), table.Close(context.Background()), store.Close(), state.Close()} {
			if err != nil {
				t.Error(err)
			}
		}
	}
	return f
}

func newFrontend(t testing.TB, budget time.Duration) *frontend {
	t.Helper()
	f := start(t, t.TempDir(), budget)
	t.Cleanup(f.close)
	return f
}

// shortDir is a directory whose path is short enough for a unix socket.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ph")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestReading(t *testing.T) {
	f := newFrontend(t, 0)
	roles, err := f.client.Roles(t.Context())
	must(t, err)
	if len(roles) != 1 || roles[0].Role != "r" || roles[0].Active != "a" || roles[0].InDoubt {
		t.Errorf("roles: %+v", roles)
	}
	sessions, err := f.client.Sessions(t.Context())
	must(t, err)
	if len(sessions) != 1 || sessions[0].ID != "S1" {
		t.Errorf("sessions: %+v", sessions)
	}
	x, err := f.client.Explain(t.Context(), "U & v")
	must(t, err)
	if x.Asked != "U & v" || x.User != "u & v" || x.Backend != "a" || x.Addresses["imap"] != "192.0.2.1:143" {
		t.Errorf("explanation: %+v", x)
	}
	x, err = f.client.Explain(t.Context(), "nobody+u")
	must(t, err)
	if !x.Unknown || x.Asked != "nobody+u" {
		t.Errorf("explanation of an unknown recipient: %+v", x)
	}
	x, err = f.client.Explain(t.Context(), "U+lists")
	must(t, err)
	if x.Unknown || x.Asked != "U+lists" || x.User != "u" || x.Backend != "a" {
		t.Errorf("explanation of a recipient: %+v", x)
	}
	for _, name := range []string{"nobody", "u%v"} {
		if x, err = f.client.Explain(t.Context(), name); err != nil || x.Asked != name || x.Error == "" {
			t.Errorf("explanation of %s: %+v, %v", name, x, err)
		}
	}
}

// TestRequests: what is not understood is answered in JSON, with what is wrong.
func TestRequests(t *testing.T) {
	f := newFrontend(t, 0)
	for _, c := range []struct {
		method, path, body string
		status             int
		code               Code
	}{
		{"GET", "/", "", 404, CodeNotFound},
		{"GET", "/v1/nonsense", "", 404, CodeNotFound},
		{"POST", "/v1/roles", "", 405, CodeMethod},
		{"GET", "/v1/switch", "", 405, CodeMethod},
		{"GET", "/v1/explain", "", 400, CodeBadRequest},
		{"POST", "/v1/switch", "", 400, CodeBadRequest},
		{"POST", "/v1/switch", "{", 400, CodeBadRequest},
		{"POST", "/v1/switch", `{"role": 1}`, 400, CodeBadRequest},
		{"POST", "/v1/switch", `{"role": "r", "to": "b", "force": true}`, 400, CodeBadRequest},
		{"POST", "/v1/switch", `{"role": "r", "to": "b"} {}`, 400, CodeBadRequest},
		{"POST", "/v1/switch", `{"role": "r"}`, 400, CodeBadRequest},
		{"POST", "/v1/switch", `{"role": "` + strings.Repeat("r", maxRequest) + `", "to": "b"}`, 413, CodeTooLarge},
		{"POST", "/v1/switch", `{"role": "r", "to": "z"}`, 409, CodeConflict},
		{"POST", "/v1/switch", `{"role": "x", "to": "b"}`, 409, CodeConflict},
		{"POST", "/v1/roles/init", `{"role": "r"}`, 400, CodeBadRequest},
		{"POST", "/v1/roles/init", `{"role": "r", "active": "b"}`, 409, CodeConflict},
	} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, "http://x"+c.path, strings.NewReader(c.body))
		must(t, err)
		resp, err := f.client.http.Do(req)
		must(t, err)
		var e Error
		if err := json.NewDecoder(resp.Body).Decode(&e); err != nil {
			t.Errorf("%s %s: %v", c.method, c.path, err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != c.status || e.Code != c.code || e.Text == "" {
			t.Errorf("%s %s %.60s: %d %+v, want %d %s", c.method, c.path, c.body, resp.StatusCode, e, c.status, c.code)
		}
	}
	if roles := f.table.Roles(); roles[0].Active != "a" || roles[0].Epoch != 1 {
		t.Errorf("a refused request has changed %+v", roles[0])
	}
}

// TestSwitchTellsWhatItWaitsFor: a session that does not leave is told of, and
// when it leaves the switch goes on.
func TestSwitchTellsWhatItWaitsFor(t *testing.T) {
	f := newFrontend(t, 0)
	stay, err := f.table.Enter(t.Context(), "u")
	must(t, err)
	var kinds []string
	req := SwitchRequest{Role: "r", To: "b", Who: "me", Reason: "because"}
	rec, err := f.client.Switch(t.Context(), req, func(p Progress) {
		switch {
		case p.Event != nil:
			kinds = append(kinds, string(p.Event.Kind))
		case strings.Contains(p.Waiting, "the end of sessions here: 1"):
			kinds = append(kinds, "waiting")
			stay.Leave(routing.End{Proven: true})
		}
	})
	must(t, err)
	if want := "held waiting acked opened"; strings.Join(kinds, " ") != want {
		t.Errorf("told: %v, want %s", kinds, want)
	}
	if rec == nil || !rec.Done || rec.To != "b" || rec.Epochs["r"] != 2 || rec.Who != "me" || rec.Why != "because" {
		t.Errorf("record: %+v", rec)
	}
}

// TestSwitchAborted: past the budget the outcome is an error with its record.
func TestSwitchAborted(t *testing.T) {
	f := newFrontend(t, 100*time.Millisecond)
	stay, err := f.table.Enter(t.Context(), "u")
	must(t, err)
	defer stay.Leave(routing.End{Proven: true})
	rec, err := f.client.Switch(t.Context(), SwitchRequest{Role: "r", To: "b"}, func(Progress) {})
	var e *Error
	if !errors.As(err, &e) || e.Code != CodeAborted || !strings.Contains(e.Text, "ack") {
		t.Errorf("error: %v", err)
	}
	if rec == nil || rec.Done || rec.From != "a" {
		t.Errorf("record: %+v", rec)
	}
}

// TestSwitchInterrupted: who waits may go away; the switch goes on.
func TestSwitchInterrupted(t *testing.T) {
	f := newFrontend(t, 0)
	stay, err := f.table.Enter(t.Context(), "u")
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	_, err = f.client.Switch(ctx, SwitchRequest{Role: "r", To: "b"}, func(Progress) { cancel() })
	if err == nil || !strings.Contains(err.Error(), "the switch goes on") {
		t.Errorf("error: %v", err)
	}
	stay.Leave(routing.End{Proven: true})
	for {
		changed := f.table.Changed()
		if row := f.table.Snapshot().Roles["r"]; row.Active == "b" {
			return
		}
		<-changed
	}
}

// TestInit: the table is lost, the operator decides.
func TestInit(t *testing.T) {
	dir := t.TempDir()
	f := start(t, dir, 0)
	stay, err := f.table.Enter(t.Context(), "u")
	must(t, err)
	stay.Leave(routing.End{Why: "the residue that would keep b from opening"})
	f.close()
	must(t, os.Remove(filepath.Join(dir, "table.json")))
	f = start(t, dir, 0)
	t.Cleanup(f.close)
	roles, err := f.client.Roles(t.Context())
	must(t, err)
	if len(roles) != 1 || !roles[0].InDoubt {
		t.Fatalf("the role should be in doubt: %+v", roles)
	}
	if _, err := f.client.Switch(t.Context(), SwitchRequest{Role: "r", To: "b"}, func(Progress) {}); err == nil {
		t.Error("a role in doubt was switched")
	}
	rec, err := f.client.InitRole(t.Context(), InitRequest{
		Role: "r", Active: "b", Who: "me", Reason: "newest mail", ConfirmedClean: true,
	}, func(Progress) {})
	must(t, err)
	if !rec.Done || rec.Who != "me (newest mail)" {
		t.Errorf("record: %+v", rec)
	}
	if row := f.table.Snapshot().Roles["r"]; row.Active != "b" || row.Doubt != nil {
		t.Errorf("row: %+v", row)
	}
}

func TestClientWithoutServer(t *testing.T) {
	dir := shortDir(t)
	stale := filepath.Join(dir, "stale")
	leaveStale(t, stale)
	for _, path := range []string{filepath.Join(dir, "none"), stale} {
		_, err := NewClient(path).Roles(t.Context())
		if err == nil || !strings.Contains(err.Error(), "no posthouse is running with the socket "+path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// leaveStale leaves a socket as a killed process does.
func leaveStale(t testing.TB, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	must(t, l.Close())
}

func TestListen(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s")
	leaveStale(t, path)
	l, err := Listen(path, 0o600)
	must(t, err)
	info, err := os.Lstat(path)
	must(t, err)
	if info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if _, err := Listen(path, 0o600); err == nil || !strings.Contains(err.Error(), "another process serves it") {
		t.Errorf("a second one: %v", err)
	}
	must(t, l.Close())
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("closing does not remove it: %v", err)
	}

	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, []byte("precious"), 0o600))
	if _, err := Listen(file, 0o600); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file in the way: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error("the file in the way was removed")
	}
	if _, err := Listen(filepath.Join(dir, "no", "s"), 0o600); err == nil || !strings.Contains(err.Error(), "no directory "+filepath.Join(dir, "no")) {
		t.Errorf("no directory: %v", err)
	}
	shared, err := Listen(filepath.Join(dir, "shared"), 0o660)
	must(t, err)
	defer shared.Close()
	if info, _ := os.Lstat(filepath.Join(dir, "shared")); info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v", info.Mode())
	}
}

func TestHealth(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "answer"}, func() float64 { return 42 }))
	var notReady error
	s := httptest.NewServer(NewHealth(registry, func() error { return notReady }))
	defer s.Close()
	for _, c := range []struct {
		path     string
		notReady error
		status   int
		body     string
	}{
		{"/livez", nil, 200, "ok"},
		{"/readyz", nil, 200, "ok"},
		{"/readyz", errors.New("draining"), 503, "draining"},
		{"/livez", errors.New("draining"), 200, "ok"},
		{"/metrics", nil, 200, "answer 42"},
		{"/v1/switch", nil, 404, ""},
	} {
		notReady = c.notReady
		resp, err := http.Get(s.URL + c.path)
		must(t, err)
		body, err := io.ReadAll(resp.Body)
		must(t, err)
		_ = resp.Body.Close()
		if resp.StatusCode != c.status || !strings.Contains(string(body), c.body) {
			t.Errorf("%s: %d %s", c.path, resp.StatusCode, body)
		}
	}
}

// compares is a comparison that takes longer than an answer may otherwise.
type compares struct{ routing.Hooks }

func (compares) Compares(string) bool { return true }

func (compares) Compare(ctx context.Context, _ routing.HookCall) (found routing.Compared, err error) {
	select {
	case <-ctx.Done():
		return found, ctx.Err()
	case <-time.After(max(ioTimeout, askTimeout) + time.Second):
		return routing.Compared{Found: "all equal"}, nil
	}
}

func TestPlanWaitsForTheComparison(t *testing.T) {
	t.Parallel()
	f := startWith(t, t.TempDir(), time.Minute, compares{})
	p, err := f.client.Plan(t.Context(), SwitchRequest{Role: "r", To: "b"})
	if err != nil || p.Compared != "all equal" {
		t.Errorf("%+v, %v", p, err)
	}
	f.close()
}

package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"time"

	"github.com/posthouse/posthouse/routing"
)

const (
	// maxRequest bounds a request's body: names and a reason.
	maxRequest = 64 << 10
	// ioTimeout bounds the reading of a request and each write of an answer;
	// a switch itself takes as long as it takes.
	ioTimeout = 10 * time.Second
)

// handler answers the API.
type handler struct {
	Source
}

// NewHandler returns the API for source. Who reaches it may do everything.
func NewHandler(source Source) http.Handler {
	h := &handler{source}
	mux := http.NewServeMux()
	for path, methods := range map[string]map[string]http.HandlerFunc{
		"/v1/version":         {http.MethodGet: h.version},
		"/v1/roles":           {http.MethodGet: h.roles},
		"/v1/roles/init":      {http.MethodPost: h.initRole},
		"/v1/switch":          {http.MethodPost: h.switchRole},
		"/v1/switch/plan":     {http.MethodPost: h.plan},
		"/v1/switch/abort":    {http.MethodPost: h.abort},
		"/v1/switch/resume":   {http.MethodPost: h.resume},
		"/v1/failover":        {http.MethodPost: h.failover},
		"/v1/rejoin":          {http.MethodPost: h.rejoin},
		"/v1/switches":        {http.MethodGet: h.switches},
		"/v1/frontends":       {http.MethodGet: h.frontends},
		"/v1/frontends/fence": {http.MethodPost: h.fence},
		"/v1/explain":         {http.MethodGet: h.explain},
		"/v1/sessions":        {http.MethodGet: h.sessions},
	} {
		mux.HandleFunc(path, byMethod(methods))
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, errorf(CodeNotFound, "there is no %s: is this client newer than the running posthouse (%s)?", r.URL.Path, h.Version))
	})
	return mux
}

// NewServer returns a server for the handler of the admin socket or of
// admin.http. It has no write timeout, because a switch is as long as it is:
// handlers bound their writes.
func NewServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: ioTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
}

// byMethod answers in JSON where the mux's own refusal would be plain text.
func byMethod(methods map[string]http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		serve, ok := methods[r.Method]
		if !ok {
			for method := range methods {
				w.Header().Set("Allow", method)
				fail(w, errorf(CodeMethod, "%s does not take %s, only %s", r.URL.Path, r.Method, method))
			}
			return
		}
		serve(w, r)
	}
}

func (h *handler) version(w http.ResponseWriter, _ *http.Request) {
	reply(w, map[string]string{"version": h.Version})
}

func (h *handler) roles(w http.ResponseWriter, _ *http.Request) {
	list := make([]Role, 0)
	for _, r := range h.Table.Roles() {
		list = append(list, Role{r, r.Doubt != nil})
	}
	reply(w, list)
}

func (h *handler) sessions(w http.ResponseWriter, _ *http.Request) { reply(w, h.Sessions()) }

func (h *handler) explain(w http.ResponseWriter, r *http.Request) {
	user := r.URL.Query().Get("user")
	if user == "" {
		fail(w, errorf(CodeBadRequest, "whom to explain? Ask for /v1/explain?user=NAME"))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), ioTimeout)
	defer cancel()
	names, err := h.Names(user)
	if err != nil {
		reply(w, Explanation{Explanation: routing.Explanation{Asked: user, Error: err.Error()}})
		return
	}
	var x routing.Explanation
	for _, name := range names {
		if x = h.Table.Explain(ctx, name); !x.Unknown {
			break
		}
	}
	x.Asked = user
	reply(w, Explanation{x, h.Table.Snapshot().Backends[x.Backend]})
}

func (h *handler) switchRole(w http.ResponseWriter, r *http.Request) {
	var req SwitchRequest
	if !decode(w, r, &req) {
		return
	}
	if req.Role == "" || req.To == "" {
		fail(w, errorf(CodeBadRequest, "a switch needs role and to"))
		return
	}
	h.stream(w, r, req.Role, func(ctx context.Context, progress func(routing.Event)) (routing.SwitchRecord, error) {
		return h.Table.Switch(ctx, req.routing(), progress)
	})
}

func (h *handler) initRole(w http.ResponseWriter, r *http.Request) {
	var req InitRequest
	if !decode(w, r, &req) {
		return
	}
	if req.Role == "" || req.Active == "" {
		fail(w, errorf(CodeBadRequest, "to decide on a role needs role and active"))
		return
	}
	who := req.Who
	if req.Reason != "" { // the table has no field for it
		who += " (" + req.Reason + ")"
	}
	h.stream(w, r, req.Role, func(ctx context.Context, _ func(routing.Event)) (routing.SwitchRecord, error) {
		if req.ConfirmedClean {
			// A role that the table has lost has no residues there either.
			if err := h.Table.ConfirmClean(ctx, req.Role); err != nil && !errors.Is(err, routing.ErrConflict) {
				return routing.SwitchRecord{}, err
			}
		}
		return h.Table.InitRole(ctx, req.Role, req.Active, who, req.AcceptStale)
	})
}

// decode reads the request's JSON, or answers what is wrong with it.
func decode(w http.ResponseWriter, r *http.Request, into any) bool {
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(ioTimeout))
	// A deadline that stays would count as the client's going away.
	defer func() { _ = rc.SetReadDeadline(time.Time{}) }()
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("something follows the object")
		}
	}
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
		return true
	case errors.As(err, &tooLarge):
		fail(w, errorf(CodeTooLarge, "the request is larger than %d octets", maxRequest))
	default:
		fail(w, errorf(CodeBadRequest, "the request is not the JSON object that %s takes: %v", r.URL.Path, err))
	}
	return false
}

func reply(w http.ResponseWriter, answer any) { send(w, http.StatusOK, answer) }

func fail(w http.ResponseWriter, e *Error) { send(w, e.Code.status(), e) }

func send(w http.ResponseWriter, status int, answer any) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(ioTimeout))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer) // else the client is gone
}

// errorOf gives an error of the table its code.
func errorOf(err error, rec routing.SwitchRecord) *Error {
	code := CodeInternal
	switch {
	case rec.AbortWhy != "":
		code = CodeAborted
	case errors.Is(err, routing.ErrConflict):
		code = CodeConflict
	case errors.Is(err, routing.ErrClosed), errors.Is(err, context.Canceled):
		code = CodeInterrupted
	}
	return &Error{Text: err.Error(), Code: code}
}

package admin

import (
	"context"
	"net/http"

	"github.com/posthouse/posthouse/routing"
)

func (h *handler) plan(w http.ResponseWriter, r *http.Request) {
	var req SwitchRequest
	if !decode(w, r, &req) {
		return
	}
	if req.Role == "" || req.To == "" {
		fail(w, errorf(CodeBadRequest, "a plan needs role and to"))
		return
	}
	// It bounds itself, and a comparison takes longer than ioTimeout.
	p, err := h.Table.Plan(r.Context(), req.routing())
	if err != nil {
		fail(w, errorOf(err, routing.SwitchRecord{}))
		return
	}
	reply(w, p)
}

func (h *handler) failover(w http.ResponseWriter, r *http.Request) {
	var req FailoverRequest
	if !decode(w, r, &req) {
		return
	}
	if req.Role == "" || req.To == "" {
		fail(w, errorf(CodeBadRequest, "a failover needs role and to"))
		return
	}
	h.stream(w, r, req.Role, func(ctx context.Context, progress func(routing.Event)) (routing.SwitchRecord, error) {
		return h.Table.Failover(ctx, routing.FailoverRequest{
			Role: req.Role, To: req.To, Who: req.Who, Why: req.Reason, AcceptLoss: req.AcceptLoss,
			AcceptStale: req.AcceptStale, ConfirmedClean: req.ConfirmedClean,
		}, progress)
	})
}

// rejoin takes as long as the hook: hours, for a large member.
func (h *handler) rejoin(w http.ResponseWriter, r *http.Request) {
	var req RejoinRequest
	if !decode(w, r, &req) {
		return
	}
	if req.Role == "" || req.Member == "" {
		fail(w, errorf(CodeBadRequest, "to rejoin needs role and member"))
		return
	}
	done, err := h.Table.Rejoin(r.Context(), routing.RejoinRequest{Role: req.Role, Member: req.Member, Who: req.Who, Why: req.Reason})
	if err != nil {
		e := errorOf(err, routing.SwitchRecord{})
		if done.Output != "" {
			e.Text += "\n" + done.Output
		}
		fail(w, e)
		return
	}
	reply(w, done)
}

func (h *handler) abort(w http.ResponseWriter, r *http.Request) {
	h.steer(w, r, func(ctx context.Context, req SteerRequest) error {
		return h.Table.Abort(ctx, routing.AbortRequest{Role: req.Role, Who: req.Who, Why: req.Reason, ConfirmedDown: req.ConfirmedDown})
	})
}

func (h *handler) resume(w http.ResponseWriter, r *http.Request) {
	h.steer(w, r, func(ctx context.Context, req SteerRequest) error {
		return h.Table.Resume(ctx, req.Role, req.Who, req.Reason)
	})
}

func (h *handler) steer(w http.ResponseWriter, r *http.Request, do func(context.Context, SteerRequest) error) {
	var req SteerRequest
	if !decode(w, r, &req) {
		return
	}
	if req.Role == "" {
		fail(w, errorf(CodeBadRequest, "%s needs role", r.URL.Path))
		return
	}
	answer(w, r, func(ctx context.Context) (any, error) { return struct{}{}, do(ctx, req) })
}

func (h *handler) switches(w http.ResponseWriter, _ *http.Request) {
	s := h.Table.Snapshot()
	list := Switches{Open: []routing.SwitchRecord{}, Ended: s.History}
	at := make(map[uint64]int) // in list.Open, by number
	for _, role := range h.Table.Roles() {
		sw := role.Switch
		if sw == nil {
			continue
		}
		n, is := at[sw.Number]
		if !is {
			n, at[sw.Number] = len(list.Open), len(list.Open)
			list.Open = append(list.Open, routing.SwitchRecord{Switch: *sw, Role: role.Role, From: role.Active, Epochs: map[string]uint64{}})
		}
		if len(sw.Roles) > 0 {
			list.Open[n].Role = sw.Roles[0]
		}
		list.Open[n].Epochs[role.Role] = role.Epoch
	}
	reply(w, list)
}

func (h *handler) frontends(w http.ResponseWriter, r *http.Request) {
	answer(w, r, func(ctx context.Context) (any, error) { return h.Table.Frontends(ctx) })
}

func (h *handler) fence(w http.ResponseWriter, r *http.Request) {
	var req FenceRequest
	if !decode(w, r, &req) {
		return
	}
	if req.Frontend == "" || !req.ConfirmedDown {
		fail(w, errorf(CodeBadRequest, "to fence a frontend needs frontend and confirmed_down: only who has seen that it is down can say so"))
		return
	}
	answer(w, r, func(ctx context.Context) (any, error) {
		return struct{}{}, h.Table.FenceFrontend(ctx, req.Frontend, req.Who, req.Reason)
	})
}

// answer replies with what do returns, within ioTimeout.
func answer(w http.ResponseWriter, r *http.Request, do func(context.Context) (any, error)) {
	ctx, cancel := context.WithTimeout(r.Context(), ioTimeout)
	defer cancel()
	found, err := do(ctx)
	if err != nil {
		fail(w, errorOf(err, routing.SwitchRecord{}))
		return
	}
	reply(w, found)
}

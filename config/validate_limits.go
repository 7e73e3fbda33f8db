package config

import (
	"fmt"
	"reflect"
	"time"
)

const (
	// minIdle: RFC 9051 §5.4 demands at least 30 minutes, and clients renew
	// IDLE every 29; the rest is room for a slow network.
	minIdle = 31 * time.Minute
	// maxKeepalive is when ipvs forgets an idle flow.
	maxKeepalive = 15 * time.Minute
	// hookEnding is how long it takes to end a hook that does not want to.
	hookEnding = 2 * time.Second
	// patience is when common clients give up a login.
	patience = 30 * time.Second
)

func (v *validation) limits() {
	v.positive("limits", v.cfg.Limits)
	l := v.cfg.Limits
	v.less("switch_budget", l.SwitchBudget, "hold_window", l.HoldWindow, "a switch that fails must not have refused anybody")
	if v.hasHooks() && l.SwitchBudget < l.HoldWindow {
		v.less("switch_budget", l.SwitchBudget, "hold_window", l.HoldWindow-hookEnding+1, "it takes up to "+hookEnding.String()+" to end a hook, which are taken off here")
	}
	v.less("undo_reserve", l.UndoReserve, "switch_budget", l.SwitchBudget, "a switch needs time to go forward")
	v.less("drain_timeout", l.DrainTimeout, "switch_budget", l.SwitchBudget, "a switch needs time left after the drain")
	if v.hasHooks() {
		v.less("drain_timeout", l.DrainTimeout, "switch_budget", l.SwitchBudget-l.UndoReserve, "hooks need time between the drain and undo_reserve, which is taken off here")
	}
	v.less("auth_failure_delay", l.AuthFailureDelay, "preauth_timeout", l.PreauthTimeout, "nobody could try twice")
	v.less("drain_timeout", l.DrainTimeout, "shutdown_timeout", l.ShutdownTimeout+1, "sessions could not be drained at the end")
	v.less("connect_timeout", l.ConnectTimeout, "backend_login_timeout", l.BackendLoginTimeout+1, "the login would be given up first")
	v.parking()
	if l.IdleTimeout > 0 && l.IdleTimeout <= minIdle {
		v.faultAt("limits.idle_timeout", l.IdleTimeout.String()+" is too short: clients may be silent for 30 minutes (RFC 9051 §5.4)", "set it to more than 31m")
	}
	if l.Keepalive >= maxKeepalive {
		v.faultAt("limits.keepalive", l.Keepalive.String()+" is too long: ipvs forgets an idle flow after 15 minutes", "set it to less than 15m, such as 120s")
	}
}

// parking checks the limits of waiting logins against each other.
func (v *validation) parking() {
	l := &v.cfg.Limits
	for _, share := range []struct {
		key   string
		limit *int
	}{
		{"max_parked_per_role", &l.MaxParkedPerRole}, {"max_parked_per_user", &l.MaxParkedPerUser},
		{"max_parked_per_ip", &l.MaxParkedPerIP}, {"max_parked_unverified", &l.MaxParkedUnverified},
	} {
		if path := "limits." + share.key; *share.limit <= l.MaxParked {
			continue
		} else if v.written(path) {
			v.faultAt(path, fmt.Sprintf("%d is more than max_parked (%d)", *share.limit, l.MaxParked), "lower it, or raise max_parked")
		}
		*share.limit = l.MaxParked
	}
	if l.EntryRate <= 0 {
		return // is reported already
	}
	through, most := time.Duration(l.MaxParkedPerRole)*time.Second/time.Duration(l.EntryRate), max(l.HoldWindow, patience)
	if l.SwitchBudget+through > most {
		v.faultAt("limits.entry_rate", fmt.Sprintf("%d a second: %d waiting logins (max_parked_per_role) would need %v after a switch of up to %v (switch_budget); clients wait for %v",
			l.EntryRate, l.MaxParkedPerRole, through, l.SwitchBudget, most), "raise it, or lower max_parked_per_role")
	}
}

// mayBeZero are the limits for which 0s means none or never.
var mayBeZero = map[string]bool{"auth_failure_delay": true, "residue_max_age": true}

// positive reports numbers and durations of a section that are not greater than
// zero.
func (v *validation) positive(path string, section any) {
	fields := reflect.ValueOf(section)
	for i := range fields.NumField() {
		if !fields.Field(i).CanInt() {
			continue
		}
		key := fields.Type().Field(i).Tag.Get("yaml")
		value := fields.Field(i).Int()
		if value < 0 || value == 0 && !mayBeZero[key] {
			v.faultAt(join(path, key), fmt.Sprint(fields.Field(i).Interface())+" is not greater than zero", "raise it, or remove it for the default")
		}
	}
}

// less reports that limit a is not less than limit b, at whichever of them the
// file holds.
func (v *validation) less(a string, low time.Duration, b string, high time.Duration, why string) {
	if low < high {
		return
	}
	at := "limits." + a
	if !v.written(at) {
		at = "limits." + b
	}
	v.faultAt(at, fmt.Sprintf("%s (%s) is too long for %s (%s): %s", a, low, b, high.Truncate(time.Microsecond), why), "lower "+a+" or raise "+b)
}

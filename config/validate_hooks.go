package config

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

func (v *validation) hooks(path string, r Role) {
	if r.Scope != "" {
		v.oneOf(path+".scope", r.Scope, ScopeBackend, ScopeRole)
	}
	hooks := r.Hooks.ByName()
	for _, name := range slices.Sorted(maps.Keys(hooks)) {
		v.program(path+".hooks."+name, hooks[name][0])
	}
	for undo, do := range map[string]string{"undo_demote": "demote", "undo_promote": "promote"} {
		if len(hooks[undo]) > 0 && len(hooks[do]) == 0 {
			v.faultAt(path+".hooks."+undo, "there is no "+do+" hook", "add it, or remove this one")
		}
	}
	if len(hooks) == 0 && r.Scope != "" {
		v.faultAt(path+".scope", "has no effect without hooks", "remove it")
	}
}

func (v *validation) hasHooks() bool {
	for _, r := range v.cfg.Roles {
		if len(r.Hooks.ByName()) > 0 {
			return true
		}
	}
	return false
}

// sharedBackends compares the roles that two backends share: where hooks may
// restart these, a switch of any of the roles takes the others with it.
func (v *validation) sharedBackends() {
	type pair [2]string
	first := make(map[pair]string)
	for _, name := range v.roleNames() {
		r := v.cfg.Roles[name]
		if r.Scope == ScopeRole {
			continue
		}
		members := slices.Sorted(slices.Values(r.Members))
		for i, a := range members {
			for _, b := range members[i+1:] {
				if other, is := first[pair{a, b}]; !is {
					first[pair{a, b}] = name
				} else {
					v.together(name, r, other, v.cfg.Roles[other], a, b)
				}
			}
		}
	}
}

func (v *validation) together(name string, r Role, otherName string, other Role, a, b string) {
	const fix = ", or state that the hooks touch nothing else (scope: role), or give each role backends of its own"
	hooks, path := r.Hooks.ByName(), join("roles", name)
	switch {
	case !maps.EqualFunc(hooks, other.Hooks.ByName(), slices.Equal[[]string]):
		v.faultAt(path+".hooks", fmt.Sprintf("not those of role %s, which is switched together with it where hooks may restart %s or %s", otherName, a, b),
			"use the same (a YAML alias will do)"+fix)
	case len(hooks) > 0 && r.Active != other.Active && r.Active != "" && other.Active != "":
		v.faultAt(path+".active", fmt.Sprintf("%s, and role %s begins on %s: neither could be switched, as hooks may restart the other's backend", r.Active, otherName, other.Active),
			"let both begin on one"+fix)
	}
}

// catchUp checks the comparison of a role, and fills its defaults in.
func (v *validation) catchUp(path string, r *Role) {
	c := &r.CatchUp
	if !v.written(path) {
		return
	}
	v.oneOf(path+".type", c.Type, CatchUpIMAP)
	if !v.written(path + ".parallel") {
		c.Parallel = 8
	}
	if !v.written(path + ".rate") {
		c.Rate = 200
	}
	if c.Parallel <= 0 {
		v.faultAt(path+".parallel", fmt.Sprintf("%d is not greater than zero", c.Parallel), "write a number such as 8")
	}
	if c.Rate < 0 {
		v.faultAt(path+".rate", fmt.Sprintf("%d is less than zero", c.Rate), "write a number such as 200, or 0 for no limit")
	}
	if len(c.Users) > 0 {
		v.program(path+".users", c.Users[0])
	}
	for _, member := range r.Members {
		b, ok := v.cfg.Backends[member]
		switch {
		case !ok: // is reported
		case b.Login.Style == StyleReplay:
			v.faultAt(path, fmt.Sprintf("%s has login style replay: nobody can look into its mailboxes without the users' passwords", member),
				"use style authzid or master-user there, or remove this")
		case b.IMAP == "" && b.Replica.IMAP == "":
			v.faultAt(path, member+" has no imap address", "add it, or replica.imap")
		}
	}
}

// program reports what cannot be run. Who runs it is the user of this process.
func (v *validation) program(path, name string) {
	if !filepath.IsAbs(name) {
		v.faultAt(path, quote(name)+" is not an absolute path", "name the program by its full path: it is run without a shell and without PATH")
		return
	}
	info, err := os.Stat(name)
	switch {
	case err != nil:
		v.faultAt(path, fmt.Sprintf("%s cannot be found: %s", name, reason(err)), "correct the path")
	case info.IsDir() || info.Mode().Perm()&0o111 == 0:
		v.faultAt(path, name+" is no program", "chmod +x, or name another file")
	}
}

"""What `Buffer` promises today, where that may change: the places at which the test follows."""

M_IS_COMPILED = False                   # another num_max_dispatch_tokens_per_rank compiles anew: few are tried
RESULTS_LIVE_BY_M = False               # a low-latency dispatch with another M leaves results alone; else all of a mode take turns
REPEATS_ARE_REFUSED = True              # a rank with more rows for one expert than M is refused before anything is launched
FIRST_USE_IS_REFUSED_ALONE = True       # a wrong expert in the first dispatch of a shape is refused before the ranks meet
DESTROYED_IS_KNOWN = True               # a handle of a Buffer that is gone is refused by every other one, whatever their addresses
RESULTS_IN_HEAP = 1                     # num_results of the heap's size hint; 1 once results never run out of room

/* SPDX-License-Identifier: Apache-2.0 */
/* Fill a Maglev table: the loop of maglev.py, slot by slot the same. */
#include <stdint.h>

#define FREE UINT32_MAX

/* Let backends take turns until every slot is taken.
 *
 * turns: indices of the backends in the order of their turns; current: the slot each tries next;
 * skips: how far each goes on. Both are consumed. owner: `size` slots, written. count > 0,
 * size >= count, current < size, 0 < skip < size, size prime: then it ends.
 */
void maglev_fill(const uint32_t *turns, uint32_t *current, const uint32_t *skips, uint32_t count,
		 uint32_t *owner, uint32_t size)
{
	uint32_t left = size, turn, slot;

	for (slot = 0; slot < size; slot++)
		owner[slot] = FREE;
	for (;;) {
		for (turn = 0; turn < count; turn++) {
			slot = current[turn];
			while (owner[slot] != FREE) {
				slot += skips[turn];
				if (slot >= size)
					slot -= size;
			}
			owner[slot] = turns[turn];
			current[turn] = slot;
			if (!--left)
				return;
		}
	}
}
